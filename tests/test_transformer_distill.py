"""Distillation of one transformer agent into another."""

import pytest
import torch
from mmenvs_agents.transformer.actions import action_head
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.config import ModelConfig
from mmenvs_agents.transformer.distill import Student
from mmenvs_agents.transformer.ppo import PPORecipe
from mmenvs_agents.transformer.rollout import collect
from typer.testing import CliRunner

from mmenvs.cli import app
from tests.test_transformer import ACTIONS
from tests.tiny_transformer import QUICK, VQA, make_agent, recall

LARGE = ModelConfig(width=64, layers=2, heads=4, kv_heads=2, hidden=64, token_width=16)
SMALLER = ModelConfig(width=32, layers=1, heads=4, kv_heads=2, hidden=32, token_width=16)
RECIPE = PPORecipe(num_envs=32, rollout_steps=12, minibatches=4, learning_rate=3e-3)


@pytest.mark.parametrize("name", ACTIONS)
def test_divergence_equals_its_definition(name):
    torch.manual_seed(0)
    head = action_head(ACTIONS[name], 8)
    p, q = (torch.randn(2, 1, head.outputs) * 0.5).expand(-1, 200_000, -1)
    raw = head.sample(p, torch.Generator().manual_seed(0))
    estimate = (head.log_prob(p, raw) - head.log_prob(q, raw)).mean()
    torch.testing.assert_close(head.kl(p, q)[0], estimate, atol=0.01, rtol=0.02)
    assert head.kl(p, q)[0] > 0.05 and head.kl(p, p).abs().max() < 1e-6


def agreement(student, teacher):
    episodes = collect(student.policy, recall(32), 99, 6, torch.Generator().manual_seed(5)).episodes
    with torch.no_grad():
        (one, worth), (other, theirs) = student.policy(episodes), teacher.policy(episodes)
    head = student.policy.actor
    same = (head.sample(one, None) == head.sample(other, None)).all(-1)
    return same.float().mean().item(), (worth - theirs).abs().mean().item(), head.kl(other, one).mean().item()


def test_a_student_comes_to_agree_with_its_teacher(tmp_path):
    teacher = TransformerAgent(recall(2), LARGE, device="cpu", precision="float32", seed=3)
    torch.nn.init.normal_(teacher.policy.actor.out.weight, std=0.3)
    torch.nn.init.normal_(teacher.policy.critic.weight, std=0.1)
    before = {name: value.clone() for name, value in teacher.policy.state_dict().items()}
    student = Student(teacher, SMALLER, env=recall(32), recipe=RECIPE, precision="float32")
    same, _, kl = agreement(student, teacher)
    assert same < 0.6 and kl > 0.3
    student.learn(8000, out=tmp_path)
    same, far, kl = agreement(student, teacher)
    assert same > 0.9 and far < 0.15 and kl < 0.1
    assert all(torch.equal(value, before[name]) for name, value in teacher.policy.state_dict().items())
    header = (tmp_path / "progress_0.csv").read_text().splitlines()[0]
    assert "train/distillation_kl" in header and "train/agreement" in header
    again = TransformerAgent.load(tmp_path, recall(32), device="cpu")
    assert type(again) is TransformerAgent and again.num_timesteps == student.num_timesteps
    again.learn(again.num_timesteps + 100)


def test_on_the_command_line(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    make_agent(VQA, QUICK).save(tmp_path / "teacher")
    common = ("--num-envs", 2, "--device", "cpu")
    result = run("distill", tmp_path / "teacher", "--steps", 32, "--out", tmp_path / "student", *common)
    assert result.exit_code == 0 and "after 32 steps" in result.output, result.output
    student = TransformerAgent.load(tmp_path / "student", device="cpu")
    assert student.settings.size == "nano" and student.settings.env_kwargs == {"image_size": 32}
    result = run("distill", tmp_path / "teacher", "--steps", 32, "--out", tmp_path / "student", *common)
    assert result.exit_code == 2 and "holds an agent" in result.output


def test_what_does_not_fit():
    teacher = make_agent(recall(2))
    with pytest.raises(ValueError, match=r"env=\.\.\. needs one"):
        Student(teacher, SMALLER)
    with pytest.raises(ValueError, match="the teacher must have the action space"):
        Student(teacher, SMALLER, env=recall(2, actions="box"))
