"""Curriculum over difficulty: promotions, what is logged of them, and that they survive a restart."""

import json
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmenvs_agents import sb3
from mmenvs_agents.curriculum import Curriculum, Progress
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.recipes import RECIPES
from mmenvs_agents.transformer.agent import TransformerAgent
from typer.testing import CliRunner

from mmenvs.cli import app
from mmenvs.integrations.sb3 import make_vec_env
from mmenvs.registry import SPECS, register
from mmenvs.tasks.vqa import VQA as VQATask
from tests.test_agents import LITTLE
from tests.tiny_transformer import CAPTIONING, QUICK, SMALL, VQA, make_agent

EAGER = Curriculum(2, threshold=0.0, window=150)  # a single success promotes


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 1)), max_size=40))
def test_promotions_by_hand(rollouts):
    curriculum, progress = Curriculum(2, 0.5, 40), Progress()
    level, pending = 0, []
    for episodes, share in rollouts:
        successes = round(episodes * share)
        got = progress.count(curriculum, episodes, successes)
        pending += [1] * successes + [0] * (episodes - successes)
        expected = None
        if level < 2 and len(pending) >= 40:
            if sum(pending) / len(pending) > 0.5:
                level, expected = level + 1, sum(pending) / len(pending)
            pending = []
        assert got == expected and progress.level == level


@pytest.mark.parametrize("id", [VQA, CAPTIONING])
def test_it_begins_at_the_bottom(id):
    agent = make_agent(id, curriculum=Curriculum(2))
    assert agent.settings.env_kwargs["difficulty"] == 2 and agent.get_env().unwrapped.task.difficulty == 0


def test_it_rises_is_logged_and_goes_on_bit_by_bit(tmp_path):
    recipe = replace(QUICK, num_envs=16)

    def agent():
        return make_agent(VQA, recipe, curriculum=EAGER)

    straight, levels = agent(), []
    straight.learn(
        1200, lambda a: levels.append(a.get_env().unwrapped.task.difficulty), out=tmp_path / "straight"
    )
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 2 and 1 in levels
    lines = (tmp_path / "straight" / "progress_0.csv").read_text().splitlines()
    column = lines[0].split(",").index("curriculum/difficulty")
    # The callback sees what the next rollout is played at.
    assert [int(float(line.split(",")[column])) for line in lines[1:]] == [0, *levels[:-1]]
    first = levels.index(1) + 2  # amid the second level's window
    broken = agent()
    broken.learn(1200, lambda a: a.iteration < first)
    broken.save(tmp_path / "broken")
    again = TransformerAgent.load(tmp_path / "broken", device="cpu")
    assert again.progress == broken.progress and again.progress.episodes > 0
    assert again.get_env().unwrapped.task.difficulty == 1
    again.learn(1200)
    for one, other in zip(straight.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(one, other)
    other = gym.make_vec(VQA, num_envs=4, **SMALL)
    assert TransformerAgent.load(tmp_path / "broken", other, device="cpu").get_env() is other


@pytest.mark.parametrize("algo", RECIPES)
def test_agents_of_stable_baselines3_rise(tmp_path, algo):
    small = {"num_envs": 8, "features_dim": 32, "fusion": "concat", "device": "cpu", **LITTLE[algo]}
    agent = sb3.make_agent(algo, VQA, curriculum=replace(EAGER, window=100), seed=1, **small)
    assert sb3.settings_of(agent).env_kwargs == {"difficulty": 2}
    assert agent.get_env().native.task.difficulty == 0
    sb3.train(agent, 512, tmp_path, progress=False)
    assert agent.progress.level > 0
    lines = (tmp_path / "progress_0.csv").read_text().splitlines()
    column = lines[0].split(",").index("curriculum/difficulty")
    values = [line.split(",")[column] for line in lines[1:]]
    # Agents with a replay buffer write their first line before they are judged.
    levels = [float(value) for value in values if value]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] > 0
    again = sb3.load(tmp_path, "cpu")
    assert again.progress == agent.progress and sb3.settings_of(again) == sb3.settings_of(agent)
    assert again.get_env().native.task.difficulty == agent.progress.level
    sb3.train(again, 600, tmp_path, progress=False)


def test_a_new_level_begins_after_the_update():
    """The rollout that promotes is learned from as it was, and the next begins with episodes of the next level."""
    agent = sb3.make_agent(
        "ppo", VQA, curriculum=Curriculum(1, 0.0, 100), fusion="concat", device="cpu", seed=1, features_dim=32,
        num_envs=64, n_steps=4, batch_size=64,
    )  # fmt: skip
    env, faced, update = agent.get_env(), [], agent.train

    def spy():
        faced.append((agent.progress.level, env.native.task.difficulty))
        assert all(
            (agent._last_obs[name] == seen).all() for name, seen in env.env._last.items() if name != "image"
        )
        update()

    agent.train = spy
    sb3.train(agent, 1024, progress=False)
    assert faced[0] == (1, 0) and set(faced[1:]) == {(1, 1)}


def test_levels_over_several_trainings():
    """The last rollout of a training may promote: the next training begins at the new level."""
    agent = sb3.make_agent(
        "ppo", VQA, curriculum=Curriculum(3, 0.0, 100), fusion="concat", device="cpu", seed=1, features_dim=32,
        num_envs=64, n_steps=4, batch_size=64,
    )  # fmt: skip
    played, level = [], 0
    for steps in range(256, 256 * 6, 256):
        sb3.train(agent, steps, progress=False)
        played.append(agent.get_env().native.task.difficulty)
        assert played[-1] == level
        level = agent.progress.level
    assert played == sorted(played) and played[-1] == 3
    with pytest.raises(ValueError, match="env can't be set with a curriculum"):
        agent.set_env(make_vec_env(VQA, 64))
        sb3.train(agent, 10_000, progress=False)


@pytest.mark.parametrize("progress", [{"episodes": "x"}, {"level": 7}, {"level": 1, "successes": 3}, [1]])
def test_damaged_progress(tmp_path, progress):
    sb3.save(sb3.make_agent("ppo", VQA, curriculum=Curriculum(1), device="cpu", num_envs=2), tmp_path)
    file = tmp_path / "settings.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "progress": progress}))
    with pytest.raises(ValueError, match="is damaged"):
        sb3.load(tmp_path, "cpu")
    # Agents that were saved before there were curricula.
    del document["progress"], document["settings"]["curriculum"]
    file.write_text(json.dumps(document))
    assert sb3.settings_of(sb3.load(tmp_path, "cpu")).curriculum is None


def test_another_environment_of_the_same_spaces():
    env = make_vec_env(VQA, 3)
    env.seed(1)
    env.reset()
    env.replace(gym.make_vec(VQA, num_envs=3, difficulty=2))
    assert env.get_attr("difficulty") == [2, 2, 2]
    env.seed(5)
    expected, _ = gym.make_vec(VQA, num_envs=3, difficulty=2).reset(seed=5)
    assert (env.reset()["question"] == expected["question"]).all()
    for other, message in (
        (gym.make_vec(VQA, num_envs=2), "num_envs of env must be 3, got 2"),
        (gym.make_vec(VQA, num_envs=3, image_size=32), "observation_space of env must be"),
        (gym.make_vec(VQA, num_envs=3, autoreset_mode="NextStep"), "SameStep"),
    ):
        with pytest.raises(ValueError, match=message):
            env.replace(other)
    assert env.step(np.zeros(3, np.int64))[1].shape == (3,)


def test_on_the_command_line(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})

    out = tmp_path / "vqa"
    common = ("train", VQA, "--agent", "transformer", "--num-envs", 2, "--device", "cpu", "--out", out)
    assert "after 32 steps" in run(*common, "--curriculum", "--difficulty", 1, "--steps", 32).output
    assert "after 64 steps" in run(*common, "--resume", "--steps", 64, "--curriculum").output
    assert TransformerAgent.load(out, device="cpu").settings.curriculum == Curriculum(1)
    scored = ("evaluate", out, "--episodes", 8, "--device", "cpu")
    assert "its curriculum had risen to difficulty 0" in run(*scored).output
    assert json.loads(run(*scored, "--json").output)["curriculum_difficulty"] == 0
    out = tmp_path / "ppo"
    common = (
        "train",
        VQA,
        "--num-envs",
        2,
        "--device",
        "cpu",
        "--curriculum",
        "--difficulty",
        1,
        "--out",
        out,
    )
    assert "after 32 steps" in run(*common, "--steps", 32).output
    assert "after 64 steps" in run(*common, "--resume", "--steps", 64).output
    for options, message in (
        (("--agent", "transformer"), "difficulty of a curriculum must be from 1"),
        (("--agent", "ppo"), "difficulty of a curriculum must be from 1"),
    ):
        result = run("train", VQA, "--curriculum", "--out", tmp_path / "b", "--device", "cpu", *options)
        assert result.exit_code == 2 and message in result.output


class Silent(VQATask):
    """VQA that doesn't tell success."""

    def __init__(self, num_envs, **kwargs):
        super().__init__(num_envs, **kwargs)
        del self.info_types["is_success"]


def test_success_must_be_told():
    register("Test/Silent-v0", Silent)
    try:
        with pytest.raises(
            ValueError, match="a curriculum needs is_success in the infos, Test/Silent-v0 has none"
        ):
            Curriculum(1).check("Test/Silent-v0", {}, ("image", "question"))
        with pytest.raises(
            ValueError, match="with is_success in its infos, Test/Silent-v0 has question_type"
        ):
            evaluate("random", "Test/Silent-v0", episodes=2)
    finally:
        del SPECS["Test/Silent-v0"], gym.registry["Test/Silent-v0"]


def test_what_does_not_fit():
    for wrong in ({"last": 0}, {"last": 1, "window": 0}, {"last": 1, "threshold": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            Curriculum(**wrong)
    with pytest.raises(TypeError, match="threshold must be a number from 0 to 1, got 'high'"):
        Curriculum(1, threshold="high")
    numpys = Curriculum(np.int64(1), np.float32(0.5), np.int64(9))
    assert json.loads(json.dumps(asdict(numpys))) == {"last": 1, "threshold": 0.5, "window": 9}
    with pytest.raises(ValueError, match="curriculum goes with an id"):
        make_agent(gym.make_vec(VQA, num_envs=2), curriculum=EAGER)
    with pytest.raises(
        ValueError, match=r"'caption' of MMRL/Captioning-v0 is Box.*12.* at 0 and Box.*20.* at 1"
    ):
        Curriculum(1).check(CAPTIONING, {}, ("image", "caption"))
    for make in (make_agent, lambda id, **more: sb3.make_agent("ppo", id, device="cpu", **more)):
        with pytest.raises(TypeError, match=r"curriculum must be Curriculum\(last, ...\).*got 2"):
            make(VQA, curriculum=2)
    for visible in (None, ("image",)):
        with pytest.raises(ValueError, match="needs the same spaces"):
            sb3.make_agent("ppo", CAPTIONING, curriculum=Curriculum(1), visible=visible, device="cpu")
    agent = make_agent(VQA, curriculum=EAGER)
    with pytest.raises(ValueError, match="env can't be set with a curriculum"):
        agent.set_env(gym.make_vec(VQA, num_envs=2))
    with pytest.raises(ValueError, match="source"):
        Curriculum(1).check(VQA, {"source": object()}, ("image",))
