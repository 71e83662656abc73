"""The transformer agent: predicting, and going on after a kill bit by bit."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.transformer import ppo
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.episodes import Episodes
from mmenvs_agents.transformer.learning import NonFiniteGradientError
from mmenvs_agents.transformer.restraints import Restraints
from mmenvs_agents.transformer.rollout import collect
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy

from mmenvs.embeddings.joint import JointConfig, JointEmbedding, save_joint
from mmenvs.integrations.sb3 import make_vec_env
from mmenvs.registry import SPECS
from tests.tiny_transformer import CAPTIONING, MATCHING, QUICK, SMALL, TINY, VQA, make_agent, recall


@pytest.mark.parametrize("id", SPECS)
def test_every_task_trains_and_is_predicted(id, tmp_path):
    agent = make_agent(id)
    before = weights(agent)
    agent.learn(64, out=tmp_path)
    assert any(not torch.equal(value, before[name]) for name, value in weights(agent).items())
    result = evaluate(agent, id, episodes=24, num_envs=8, env_kwargs=SMALL)
    assert 0.0 <= result.success.value <= 1.0
    single = gym.make(id, **SMALL)
    observation, _ = single.reset(seed=0)
    action, _ = agent.predict(observation, deterministic=True)
    assert single.action_space.contains(action)
    for env in (make_vec_env(id, 3, seed=1, **SMALL), gym.make(id, **SMALL)):
        with pytest.warns(UserWarning, match="Monitor") if isinstance(env, gym.Env) else nullcontext():
            mean, _ = evaluate_policy(agent, env, n_eval_episodes=4)
        assert 0.0 <= mean <= 1.0


def test_pictures_may_come_channels_first():
    agent = make_agent()
    raw, _ = gym.make_vec(VQA, num_envs=6, **SMALL).reset(seed=0)
    theirs = make_vec_env(VQA, 6, seed=0, **SMALL).reset()
    assert theirs["image"].shape != raw["image"].shape
    one, other = (agent.predict(seen)[1].cache.keys for seen in (raw, theirs))
    assert torch.equal(one, other) and not torch.equal(one[:, 0], one[:, 1])


def test_predict_remembers_the_episode():
    """Fed the same actions, it gives the same distribution as the pass over the whole episode."""
    agent = make_agent(CAPTIONING)
    torch.nn.init.normal_(agent.policy.actor.out.weight, std=0.3)
    envs = gym.make_vec(CAPTIONING, num_envs=3, **SMALL)
    observation, _ = envs.reset(seed=0)
    pictures, state, said = observation["image"], None, []
    for _ in range(4):
        actions, state = agent.predict(observation, state, deterministic=True)
        said.append(actions)
        observation, *_ = envs.step(actions)
    episodes = Episodes(
        {"image": torch.as_tensor(pictures)},
        {},
        torch.as_tensor(np.stack(said, 1))[..., None],
        torch.full((3,), 4),
    )
    described, _ = agent.policy(episodes)
    np.testing.assert_array_equal(described.argmax(-1).numpy(), np.stack(said, 1))


def test_what_an_agent_answers_does_not_depend_on_the_precision_it_learns_in():
    agents = [
        TransformerAgent(CAPTIONING, TINY, recipe=QUICK, device="cpu", env_kwargs=SMALL, precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    envs = gym.make_vec(CAPTIONING, num_envs=64, **SMALL)
    played, said, likeliest = [], [], []
    for agent in agents:
        torch.nn.init.normal_(agent.policy.actor.out.weight, generator=torch.Generator().manual_seed(0))
        played.append(collect(agent.policy, envs, 0, 1, torch.Generator().manual_seed(0)))
        likeliest.append(collect(agent.policy, envs, 0, 1, None))
        observation, state, words = envs.reset(seed=0)[0], None, []
        for step in range(6):
            # Drawn as well as the most likely ones.
            actions, state = agent.predict(observation, state, deterministic=step % 2 == 0)
            words.append(actions)
            observation, *_ = envs.step(actions)
        said.append(np.stack(words))
    assert not torch.equal(played[0].log_probs[:, 0], played[1].log_probs[:, 0])
    np.testing.assert_array_equal(*said)
    # SCST's baseline and the alarm's held-out score.
    for name in ("log_probs", "values", "rewards"):
        assert torch.equal(*(getattr(rollout, name) for rollout in likeliest)), name
    assert agents[1].policy.precision == agents[1].policy.extractor.precision == "bfloat16"
    other = agents[1].policy.in_float32()
    assert other.precision == other.extractor.precision == "float32"
    assert all(a is b for a, b in zip(other.parameters(), agents[1].policy.parameters(), strict=True))


def test_observations_of_one_call_have_one_batch_size():
    agent = make_agent()
    whole, _ = gym.make_vec(VQA, num_envs=4, **SMALL).reset(seed=0)
    for image, question, told in (
        (whole["image"][:2], whole["question"], "image 2, question 4"),
        (whole["image"], whole["question"][:2], "image 4, question 2"),
        (whole["image"][0], whole["question"], "image none, question 4"),
        (whole["image"][:1], whole["question"][0], "image 1, question none"),
    ):
        with pytest.raises(ValueError, match=f"must have one batch size, got {told}"):
            agent.predict({"image": image, "question": question})
    with pytest.raises(ValueError, match="episode_start must hold 4 bools"):
        agent.predict(whole, episode_start=np.array([True]))


def test_callbacks_and_logs(tmp_path):
    agent = make_agent()
    agent.learn(10_000, lambda agent: agent.iteration < 2, out=tmp_path)
    assert agent.iteration == 2 and agent.num_timesteps == 64
    assert list(tmp_path.glob("events*")) and (tmp_path / "settings.json").exists()
    header = (tmp_path / "progress_0.csv").read_text().splitlines()
    assert "rollout/success_rate" in header[0] and "train/approx_kl" in header[0] and len(header) == 3

    class Counts(BaseCallback):
        steps = 0

        def _on_step(self):
            self.steps += 1
            assert self.model is agent and self.training_env is agent.get_env()
            return self.num_timesteps < 64 + 48

    counts = Counts()
    agent.learn(10_000, counts, progress_bar=True)
    assert counts.steps == 8 and agent.num_timesteps == 128
    with pytest.raises(TypeError, match="callback"):
        agent.learn(10_000, callback=3)
    with pytest.raises(ValueError, match="over the 128"):
        agent.learn(100)


# --- saving


def weights(agent):
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


def assert_same(one, other):
    assert one.num_timesteps == other.num_timesteps and one.iteration == other.iteration
    for name, value in weights(one).items():
        assert torch.equal(value, weights(other)[name]), name
    theirs = other.optimizer.state_dict()["state"]
    for index, state in one.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[index][name]))


@pytest.mark.parametrize("id", [VQA, CAPTIONING])
def test_it_goes_on_bit_by_bit(id, tmp_path):
    straight, first = make_agent(id), make_agent(id)
    straight.learn(200)
    first.learn(200, lambda agent: agent.iteration < 1)
    first.save(tmp_path)
    global_state = torch.get_rng_state()
    second = TransformerAgent.load(tmp_path, device="cpu")
    assert torch.equal(torch.get_rng_state(), global_state)
    assert_same(second, first)
    second.learn(200)
    assert second.iteration > 1
    assert_same(second, straight)


def test_a_checkpoint_amid_a_rollout_is_that_of_its_beginning(tmp_path):
    class Saves(BaseCallback):
        def _on_step(self):
            if self.model.iteration == 1:
                self.model.save(tmp_path)
            return self.model.iteration < 1

    agent, straight = make_agent(), make_agent()
    agent.learn(96, Saves())
    again = TransformerAgent.load(tmp_path, device="cpu")
    assert again.num_timesteps == 32
    again.learn(96)
    straight.learn(96)
    assert_same(again, straight)


KILLED = """
import sys
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.config import ModelConfig
from mmenvs_agents.transformer.ppo import PPORecipe
agent = TransformerAgent("MMRL/VQA-v0", ModelConfig(**{model}), recipe=PPORecipe(**{recipe}), device="cpu",
                         precision="float32", env_kwargs={{"image_size": 32}})
print("ready", flush=True)
agent.learn(10**9, out=sys.argv[1], checkpoint_steps=1)
"""


def test_kill_9_loses_nothing_but_time(tmp_path):
    import dataclasses

    out = tmp_path / "run"
    code = KILLED.format(model=dataclasses.asdict(TINY), recipe=dataclasses.asdict(QUICK))
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while not (out / "settings.json").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    agent = TransformerAgent.load(out, device="cpu")
    assert agent.num_timesteps > 0
    straight, target = make_agent(), agent.iteration + 2
    for one in (agent, straight):
        one.learn(10**9, lambda agent: agent.iteration < target)
    assert_same(agent, straight)
    agent.save(out)
    assert len(list(out.glob("state_*"))) == 1 and not list(out.glob(".state_*"))


def test_a_checkpoint_that_was_cut_off_is_never_picked_up(tmp_path, monkeypatch):
    from mmenvs_agents.transformer import checkpoint

    agent = make_agent()
    agent.learn(32, out=tmp_path)
    before = weights(agent)
    true = checkpoint.replacing

    def cut(path):
        if path.name == "settings.json":
            raise KeyboardInterrupt
        return true(path)

    monkeypatch.setattr(checkpoint, "replacing", cut)
    agent.learn(64)
    with pytest.raises(KeyboardInterrupt):
        agent.save(tmp_path)
    assert len(list(tmp_path.glob("state_*"))) == 2
    (tmp_path / ".state_96-x.safetensors").write_bytes(b"half")
    again = TransformerAgent.load(tmp_path, device="cpu")
    assert again.num_timesteps == 32 and all(torch.equal(v, weights(again)[k]) for k, v in before.items())
    monkeypatch.undo()
    agent.save(tmp_path)
    assert TransformerAgent.load(tmp_path, device="cpu").num_timesteps == 64
    assert [file.name for file in tmp_path.glob("*state_*")] == ["state_64.safetensors"]


def test_nan_in_a_gradient_stops_and_the_last_checkpoint_stands(tmp_path, monkeypatch):
    agent = make_agent()
    agent.learn(32, out=tmp_path)
    before = weights(agent)
    agent.policy.blocks[1].down.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteGradientError, match=r"gradient of blocks\.1\.down\.weight is not finite"):
        agent.learn(10_000, out=tmp_path)
    again = TransformerAgent.load(tmp_path, device="cpu")
    assert again.num_timesteps == 32
    assert all(torch.equal(value, weights(again)[name]) for name, value in before.items())


def damaged(folder, change):
    file = folder / "settings.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "has format 99, this version reads format 2"),
        (lambda d: d.pop("agent"), "no transformer agent"),
        (lambda d: d.pop("settings"), "lacks|damaged"),
        (lambda d: d.update(iteration=-1), "iteration must be from 0"),
        (lambda d: d.update(iteration=7), "different checkpoints"),
        (lambda d: d["settings"]["model"].update(width=10**9), "width must be from 1"),
        (lambda d: d["settings"]["model"].update(width=64), "don't fit"),
        (lambda d: d["settings"]["model"].update(depth=64), "damaged"),
        (lambda d: d["settings"]["recipe"].update(gamma=2.0), "gamma must be from 0 to 1"),
        (lambda d: d["settings"].update(precision="int4"), "precision"),
        (lambda d: d["settings"].update(temprature=2.0), "unknown settings temprature"),
        (lambda d: d["settings"].update(fusion="glue"), "fusion must be one of"),
        (lambda d: d["settings"].update(fusion="film"), "don't fit"),
        (lambda d: d["settings"].update(encoders={"image": "nothing"}), "nothing"),
        (lambda d: d.update(padding="x" * 2**20), "bytes"),
    ],
)
def test_bad_checkpoints(tmp_path, change, message):
    make_agent().save(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        TransformerAgent.load(tmp_path, device="cpu")


def test_arguments_that_change_what_an_agent_sees_are_named(tmp_path):
    make_agent().save(tmp_path)
    with pytest.raises(ValueError, match=r"don't fit its settings; image_size given here may differ from"):
        TransformerAgent.load(tmp_path, device="cpu", env_kwargs={"image_size": 96})


def test_agents_of_before_there_was_a_fusion_have_none(tmp_path):
    agent = make_agent(fusion="attention")
    agent.learn(32, out=tmp_path)
    damaged(tmp_path, lambda document: document["settings"].pop("fusion"))
    assert_same(TransformerAgent.load(tmp_path, device="cpu"), agent)
    begun = TransformerAgent(VQA, init=tmp_path, device="cpu", env_kwargs=SMALL)
    assert begun.settings.fusion == "attention"


def told(parts):
    return parts["scene_f1"] / 2


def test_a_reward_that_is_a_function_is_handed_over_again(tmp_path):
    agent = make_agent(CAPTIONING, env_kwargs={**SMALL, "reward": told})
    agent.learn(64, out=tmp_path)
    with pytest.raises(
        ValueError, match=r"reward of its environment was an object.*env_kwargs=\{'reward': ...\}"
    ):
        TransformerAgent.load(tmp_path, device="cpu")
    again = TransformerAgent.load(tmp_path, device="cpu", env_kwargs={"reward": told})
    assert again.get_env().task.reward is told
    assert_same(again, agent)
    elsewhere = TransformerAgent.load(tmp_path, gym.make_vec(CAPTIONING, num_envs=4, **SMALL), device="cpu")
    assert_same(elsewhere, agent)
    elsewhere.save(tmp_path / "again")
    with pytest.raises(ValueError, match="reward of its environment was an object"):
        TransformerAgent.load(tmp_path / "again", device="cpu")


@pytest.mark.parametrize("name", ["env_kwargs", "encoders", "size"])
def test_arguments_of_another_type_are_named(name):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got 3"):
        TransformerAgent(VQA, device="cpu", **{name: 3})


def test_what_predict_is_handed_is_checked():
    agent = make_agent()
    observation, _ = gym.make_vec(VQA, num_envs=3, **SMALL).reset(seed=0)
    _, state = agent.predict(observation)
    with pytest.raises(TypeError, match="observation must be a dict of image, question, got NoneType"):
        agent.predict(None)
    with pytest.raises(ValueError, match=r"episode_start must hold 3 bools, got shape \(1,\)"):
        agent.predict(observation, state=state, episode_start=np.array([True]))


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39])
def test_rewards_that_are_no_finite_numbers_are_named(reward):
    class Paid(gym.Wrapper):
        def step(self, action):
            return *(seen := self.env.step(action))[:1], reward, *seen[2:]

    def make():
        return Paid(gym.make(VQA, **SMALL))

    envs = gym.vector.SyncVectorEnv([make] * 4, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    with pytest.raises(
        ValueError,
        match=f"rewards of the environment must be finite float32 numbers, got {reward}".replace("+", "."),
    ):
        make_agent(envs).learn(64)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no agent"):
        TransformerAgent.load(tmp_path)
    make_agent().save(tmp_path)
    state = tmp_path / "state_0.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"state_0\.safetensors is damaged"):
        TransformerAgent.load(tmp_path, device="cpu")
    state.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(ValueError, match=r"state_0\.safetensors is damaged: .* checksum"):
        TransformerAgent.load(tmp_path, device="cpu")
    state.unlink()
    with pytest.raises(FileNotFoundError, match="state_0"):
        TransformerAgent.load(tmp_path, device="cpu")
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        TransformerAgent.load(tmp_path, device="cpu")


def test_agents_of_other_environments_are_loaded_with_one(tmp_path):
    agent = make_agent(recall(4))
    agent.learn(40, out=tmp_path)
    with pytest.raises(ValueError, match="needs one"):
        TransformerAgent.load(tmp_path, device="cpu")
    assert_same(TransformerAgent.load(tmp_path, recall(4), device="cpu"), agent)
    with pytest.raises(ValueError, match="fit"):
        TransformerAgent.load(tmp_path, recall(4, actions="box"), device="cpu")


# --- what doesn't fit


def test_wrong_arguments(monkeypatch):
    with pytest.raises(ValueError, match="nano, small, base"):
        TransformerAgent(VQA, "huge")
    with pytest.raises(gym.error.NameNotFound):
        TransformerAgent("MMRL/Nothing-v0")
    with pytest.raises(TypeError, match="can be saved"):
        make_agent(encoders={"image": torch.nn.Identity()})
    with pytest.raises(ValueError, match="env_kwargs goes with an id"):
        make_agent(recall(), env_kwargs={"difficulty": 1})
    with pytest.raises(ValueError, match="SameStep"):
        make_agent(VQA, env_kwargs={"autoreset_mode": "NextStep"})
    with pytest.raises(ValueError, match="'ids'"):
        make_agent(VQA, env_kwargs={"text": "string"})
    with pytest.raises(TypeError, match="vector environment"):
        make_agent(gym.make(VQA))
    with pytest.raises(TypeError, match="Dict observations"):
        make_agent(
            gym.make_vec("CartPole-v1", 2, "sync", vector_kwargs={"autoreset_mode": AutoresetMode.SAME_STEP})
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="finds no CUDA device"):
        TransformerAgent(VQA, device="cuda")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="compile=True needs a C"):
        make_agent(compile=True)
    with pytest.raises(TypeError, match="compile must be True or False"):
        make_agent(compile=1)
    for wrong, message in (({"epochs": 0}, "epochs"), ({"gamma": 1.1}, "gamma"), ({"clip": -1.0}, "clip")):
        with pytest.raises(ValueError, match=f"{message} must be from"):
            ppo.PPORecipe(**wrong)
    with pytest.raises(TypeError, match="entropy must be a number"):
        ppo.PPORecipe(entropy="much")


def test_no_agent_is_lost_by_saving_another(tmp_path):
    first, other = make_agent(), make_agent(seed=1)
    first.save(tmp_path)
    first.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for overwrite in (lambda: other.save(tmp_path), lambda: other.learn(32, out=tmp_path)):
        with pytest.raises(ValueError, match="holds another agent: choose another folder, or load that one"):
            overwrite()
    with pytest.raises(ValueError, match="out must be the path of a folder, got ''"):
        other.learn(32, out="")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()} and not other.num_timesteps
    TransformerAgent.load(tmp_path, device="cpu").learn(32, out=tmp_path)


def test_settings_by_numpy_numbers_are_saved(tmp_path):
    recipe = ppo.PPORecipe(num_envs=np.int64(4), gamma=np.float32(0.5), imitation=np.float64(0))
    restraints = Restraints(kl=np.float32(0.25), penalties={"length": np.float32(0.5)})
    agent = make_agent(
        CAPTIONING, recipe, seed=np.int64(3), restraints=restraints, temperature=np.float32(0.5)
    )
    agent.save(tmp_path)
    settings = TransformerAgent.load(tmp_path, device="cpu").settings
    assert settings.recipe == recipe and settings.restraints == restraints and settings.seed == 3


def test_an_agent_and_its_embedding_are_moved_together(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    monkeypatch.chdir(one)
    save_joint(JointEmbedding(JointConfig(width=8, dim=8, text_depth=1)), one / "joint.safetensors", {})
    agent = make_agent(encoders={"image": "joint:joint.safetensors"})
    assert agent.settings.encoders == {"image": f"joint:{one}/joint.safetensors"}
    agent.save("agent")
    monkeypatch.chdir(tmp_path)
    TransformerAgent.load(one / "agent", device="cpu")
    one.rename(other)
    found = {"image": f"joint:{other}/joint.safetensors"}
    assert TransformerAgent.load(other / "agent", device="cpu").settings.encoders == found
    begun = TransformerAgent(VQA, init=other / "agent", device="cpu", env_kwargs=SMALL)
    assert begun.settings.encoders == found
    with pytest.raises(TypeError, match="env_kwargs must be a dict of arguments of the environment, got 3"):
        TransformerAgent.load(other / "agent", device="cpu", env_kwargs=3)


def test_environments_and_observations_that_do_not_fit():
    agent = make_agent()
    agent.set_env(gym.make_vec(VQA, num_envs=4, difficulty=1, **SMALL))
    assert agent.n_envs == 4
    for other in (MATCHING, VQA):
        with pytest.raises(ValueError, match="observation space"):
            agent.set_env(gym.make_vec(other, num_envs=4))
    observation, _ = agent.get_env().reset(seed=0)
    with pytest.raises(ValueError, match="lacks 'question'"):
        agent.predict({"image": observation["image"]})
    with pytest.raises(ValueError, match=r"must be \(B, 32, 32, 3\)"):
        agent.predict({**observation, "image": observation["image"][:, :16]})
    _, state = agent.predict(observation)
    with pytest.raises(ValueError, match="2 rows"):
        agent.predict({name: value[:2] for name, value in observation.items()}, state)


def test_episodes_without_an_end_are_refused(monkeypatch):
    monkeypatch.setattr("mmenvs_agents.transformer.rollout.LONGEST", 2)
    with pytest.raises(ValueError, match="no end after 2 steps"):
        make_agent(recall(2)).learn(10)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("precision", "compile"), [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_learning_on_cuda(precision, compile):
    agent = TransformerAgent(
        CAPTIONING, TINY, recipe=QUICK, device="cuda", precision=precision, env_kwargs=SMALL, compile=compile
    )
    agent.learn(200)
    assert agent.policy.device.type == "cuda"
