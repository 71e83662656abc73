"""Recipes, baselines, saving and loading, and that an agent learns."""

import json
import os
import re

import gymnasium as gym
import numpy as np
import pytest
import torch
from mmenvs_agents.baselines import BASELINES, MostFrequentAgent, OracleAgent, RandomAgent
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.recipes import RECIPES
from mmenvs_agents.sb3 import load, make_agent, resolve_device, save, settings_of, train

from mmenvs.embeddings import Pretrained
from mmenvs.embeddings.joint import JointConfig, JointEmbedding, load_shapes, save_joint, weights_hash
from mmenvs.text import Vocabulary

VQA, MATCHING = "MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0"
SMALL = {"num_envs": 8, "features_dim": 32, "fusion": "concat", "device": "cpu"}
LITTLE = {
    "ppo": {"n_steps": 8, "batch_size": 32},
    "a2c": {},
    "dqn": {"buffer_size": 200, "learning_starts": 32, "batch_size": 16},
    "trpo": {"n_steps": 8, "batch_size": 32, "cg_max_steps": 3, "n_critic_updates": 2},
    "recurrent_ppo": {"n_steps": 8, "batch_size": 32, "n_epochs": 1},
    "qrdqn": {"buffer_size": 200, "learning_starts": 32, "batch_size": 16},
}


def weights(agent):
    return {name: value.clone() for name, value in agent.policy.state_dict().items()}


@pytest.mark.parametrize("algo", RECIPES)
def test_every_recipe_trains_saves_and_goes_on(algo, tmp_path):
    agent = make_agent(algo, VQA, **SMALL, **LITTLE[algo])
    before = weights(agent)
    assert train(agent, 128, tmp_path, progress=False)
    assert any(not torch.equal(before[name], value) for name, value in weights(agent).items())
    again = load(tmp_path, "cpu")
    assert again.num_timesteps == agent.num_timesteps
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(agent).items())
    observation, _ = gym.make_vec(VQA, num_envs=20).reset(seed=0)
    np.testing.assert_array_equal(
        agent.predict(observation, deterministic=True)[0], again.predict(observation, deterministic=True)[0]
    )
    train(again, 256, tmp_path, progress=False)
    assert again.num_timesteps >= 256
    assert len(list(tmp_path.glob("progress_*.csv"))) == 2
    assert len(list(tmp_path.glob("weights_*"))) == len(list(tmp_path.glob("optimizer_*"))) == 1


@pytest.mark.parametrize(("id", "size"), [(VQA, 50_000), (MATCHING, 23_000)])
def test_replay_buffers_fit_the_memory(id, size):
    agent = make_agent("dqn", id, **SMALL)
    buffer = agent.replay_buffer
    kept = [*buffer.observations.values(), *buffer.next_observations.values()]
    assert sum(part.nbytes for part in kept) <= 5 * 2**30
    assert size - 1000 < agent.buffer_size <= max(size, 24_000)
    assert make_agent("dqn", id, **SMALL, buffer_size=800).buffer_size == 800


def test_ppo_learns_more_than_the_blind_know():
    """40 thousand steps: well over what the words alone give away."""
    agent = make_agent("ppo", VQA, fusion="concat", device="cpu")
    train(agent, 40_000, progress=False)
    scores = {
        name: evaluate(player, VQA, episodes=1000).success.value
        for name, player in {"agent": agent, **{name: name for name in BASELINES}}.items()
    }
    assert scores["oracle"] == 1.0
    assert scores["random"] < 0.07
    assert 0.2 < scores["most_frequent"] < 0.4
    assert scores["agent"] > scores["most_frequent"] + 0.08


def test_neighbouring_seeds_learn_from_other_episodes():
    first, second = (
        make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"], seed=seed).get_env().reset()["image"]
        for seed in (0, 1)
    )
    assert not any((one == two).all() for one in first for two in second)


def test_the_extractor_is_saved_once(tmp_path):
    agent = make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"])
    save(agent, tmp_path)
    (file,) = tmp_path.glob("weights_*.safetensors")
    distinct = {value.data_ptr(): value.numel() for value in agent.policy.state_dict().values()}
    assert file.stat().st_size < 4 * sum(distinct.values()) * 1.1 + 20_000
    loaded = load(tmp_path, "cpu")
    for name, value in agent.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])


def test_modules_that_could_not_be_saved_are_refused_at_once():
    with pytest.raises(TypeError, match="can be saved"):
        make_agent("ppo", VQA, encoders={"image": torch.nn.Identity()})
    with pytest.raises(ValueError, match="vocabulary=None"):
        make_agent(
            "ppo", VQA, encoders={"question": Pretrained("some/model", vocabulary=Vocabulary(["red"]))}
        )


def test_same_seed_same_weights():
    runs = []
    for _ in range(2):
        agent = make_agent("ppo", MATCHING, **SMALL, **LITTLE["ppo"], seed=3, env_kwargs={"image_size": 32})
        train(agent, 128, progress=False)
        runs.append(weights(agent))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_blind_agent_does_not_see():
    agent = make_agent("ppo", VQA, **SMALL, visible=("question",))
    observation, _ = gym.make_vec(VQA, num_envs=16).reset(seed=0)
    other = {**observation, "image": 255 - observation["image"]}
    np.testing.assert_array_equal(
        agent.predict(observation, deterministic=True)[0], agent.predict(other, deterministic=True)[0]
    )


def test_baselines_play():
    envs = gym.make_vec(VQA, num_envs=64, split="test")
    observation, _ = envs.reset(seed=0)
    oracle, _ = OracleAgent(envs).predict(observation)
    np.testing.assert_array_equal(oracle, envs.oracle_actions())
    random, _ = RandomAgent(envs, seed=1).predict(observation)
    assert random.shape == (64,) and random.min() >= 0 and random.max() < 34
    frequent = MostFrequentAgent(envs)
    actions, _ = frequent.predict(observation, episode_start=np.ones(64, bool))
    kinds = envs.task.questions.type
    assert all(len(set(actions[kinds == kind])) == 1 for kind in set(kinds))


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        ({"algo": "sarsa"}, ValueError, "algo must be one of ppo, a2c, dqn"),
        ({"fusion": "sum"}, ValueError, "fusion must be one of concat"),
        ({"id": "MMRL/VQ-v0"}, gym.error.NameNotFound, "MMRL/VQA-v0"),
        ({"device": "tpu"}, ValueError, "device must be 'auto', 'cpu' or 'cuda'"),
        ({"seed": -1}, ValueError, "seed"),
        ({"visible": ("sound",)}, ValueError, "visible must name some of image, question"),
        ({"visible": ()}, ValueError, "visible"),
        ({"env_kwargs": {"difficulty": 7}}, ValueError, "difficulty"),
        ({"env_kwargs": 3}, TypeError, "env_kwargs must be a dict of arguments of the environment, got 3"),
        ({"gamma": 2.0}, ValueError, "gamma must be from 0 to 1, got 2.0"),
        ({"gae_lambda": "x"}, TypeError, "gae_lambda must be a number from 0 to 1, got 'x'"),
        ({"ent_coef": "x"}, TypeError, "ent_coef must be a number from 0 to 1e+06, got 'x'"),
        ({"ent_coef": float("nan")}, ValueError, "ent_coef must be from 0 to 1e+06, got nan"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must be from 0 to 1e+06, got -0.001"),
        ({"num_envs": 0}, ValueError, "num_envs must be from 1 to"),
        ({"features_dim": 1.5}, TypeError, "features_dim must be an integer from 1 to 65536, got 1.5"),
        (
            {"net_arch": "wide"},
            TypeError,
            "net_arch must be the sizes of hidden layers, such as (64, 64), got 'wide'",
        ),
        ({"net_arch": (64, 0)}, ValueError, "net_arch[1] must be from 1 to 65536, got 0"),
        ({"n_epochs": 0}, ValueError, "n_epochs must be from 1 to"),
        ({"n_steps": 0}, ValueError, "n_steps must be from 1 to"),
        ({"n_steps": 1.5}, TypeError, "n_steps must be an integer from 1 to"),
        ({"n_steps": 1, "num_envs": 1}, ValueError, "got num_envs=1, n_steps=1, batch_size=1"),
        ({"batch_size": 1}, ValueError, "batch_size, must be 2 at least"),
        ({"clip_range": -1}, ValueError, "clip_range must be from 0 to 1e+06, got -1"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be from 0 to inf, got -1"),
        ({"target_kl": "x"}, TypeError, "target_kl must be a number from 0 to 1e+06, got 'x'"),
        ({"tensorboard_log": print}, TypeError, "tensorboard_log must be a number, a text, None, or"),
        ({"clip_range_vf": 0}, ValueError, "clip_range_vf must be over 0, or None for no clipping, got 0"),
        (
            {"algo": "a2c", "n_steps": 1, "num_envs": 1, "normalize_advantage": True},
            ValueError,
            "got num_envs=1, n_steps=1",
        ),
        ({"algo": "dqn", "exploration_fraction": 2}, ValueError, "exploration_fraction must be from 0 to 1"),
        ({"normalize_advantage": "yes"}, TypeError, "normalize_advantage must be True or False, got 'yes'"),
        ({"batch_size": 10**12}, ValueError, "batch_size must be from 1 to 1048576, got 1000000000000"),
        ({"id": None}, TypeError, "id must be the id of an environment, such as 'MMRL/VQA-v0', got None"),
        ({"visible": ("image", "image")}, ValueError, "visible must name some of image, question"),
        ({"algo": "dqn", "train_freq": (4, "step")}, TypeError, "train_freq must be an integer from 1 to"),
        ({"algo": "dqn", "buffer_size": 0}, ValueError, "buffer_size must be from 1 to"),
        ({"entropy": 0.1}, TypeError, "'entropy' must be of the recipe (ent_coef, features_dim"),
        ({"policy_kwargs": {}}, TypeError, "or of ppo (batch_size, clip_range"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, says):
    with pytest.raises(error, match=re.escape(says)):
        make_agent(**{"algo": "ppo", "id": VQA, **SMALL, **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_never_replaced_in_silence():
    with pytest.raises(ValueError, match="torch finds no CUDA device"):
        resolve_device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_runs_on_cuda():
    agent = make_agent("ppo", VQA, **{**SMALL, "device": "cuda"}, **LITTLE["ppo"])
    train(agent, 128, progress=False)
    assert next(agent.policy.parameters()).is_cuda


def told(parts):
    return parts["scene_f1"] / 2


def test_a_reward_that_is_a_function_is_handed_over_again(tmp_path):
    kwargs = {"reward": told, "difficulty": np.int64(1)}
    agent = make_agent("ppo", "MMRL/Captioning-v0", **SMALL, **LITTLE["ppo"], env_kwargs=kwargs)
    save(agent, tmp_path)
    with pytest.raises(
        ValueError, match=r"reward of its environment was an object.*env_kwargs=\{'reward': ...\}"
    ):
        load(tmp_path, "cpu")
    again = load(tmp_path, "cpu", {"reward": told})
    assert again.get_env().get_attr("reward")[0] is told
    assert again.get_env().get_attr("difficulty")[0] == 1


def test_arguments_that_change_what_an_agent_sees_are_named(tmp_path):
    save(make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"], encoders={"image": "cnn"}), tmp_path)
    with pytest.raises(ValueError, match=r"don't fit the agent .*; image_size given here may differ from"):
        load(tmp_path, "cpu", {"image_size": 96})


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no agent in"):
        load(tmp_path / "nowhere")
    agent = make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"])
    save(agent, tmp_path)
    file = next(tmp_path.glob("weights_*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(ValueError, match=r"cannot load the agent in .* is damaged: weights_0"):
        load(tmp_path, "cpu")
    file.write_bytes(whole[:-100] + bytes(100))
    with pytest.raises(ValueError, match=r"weights_0.safetensors is damaged: .* checksum"):
        load(tmp_path, "cpu")
    document = json.loads((tmp_path / "settings.json").read_text())
    file.write_bytes(whole)
    document["settings"]["fusion"] = "transformer"
    (tmp_path / "settings.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"don't fit the agent of settings.json; if another version"):
        load(tmp_path, "cpu")
    for steps in (float("inf"), -1, "many"):
        (tmp_path / "settings.json").write_text(json.dumps({**document, "steps": steps}))
        with pytest.raises(ValueError, match=r"settings.json is damaged: it holds no settings of an agent"):
            load(tmp_path, "cpu")
    (tmp_path / "settings.json").write_text(json.dumps({**document, "agent": "transformer"}))
    with pytest.raises(ValueError, match=r"it is a transformer agent, which TransformerAgent.load reads"):
        load(tmp_path, "cpu")
    for name in ("recipe", "seed"):
        del document["settings"][name]
        (tmp_path / "settings.json").write_text(json.dumps(document))
        with pytest.raises(ValueError, match=rf"settings.json is damaged: it lacks '{name}'$"):
            load(tmp_path, "cpu")
    save(agent, tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="weights_0"):
        load(tmp_path, "cpu")
    (tmp_path / "settings.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load(tmp_path, "cpu")


def test_an_agent_of_another_joint_embedding_is_refused(tmp_path):
    joint, folder = tmp_path / "joint.safetensors", tmp_path / "agent"

    def write(seed):
        torch.manual_seed(seed)
        save_joint(JointEmbedding(JointConfig(width=8, dim=8, text_depth=1)), joint, {})

    write(0)
    encoders = {"image": f"joint:{joint}", "question": "shapes"}
    save(make_agent("ppo", VQA, encoders=encoders, **SMALL, **LITTLE["ppo"]), folder)
    known = json.loads((folder / "settings.json").read_text())["joints"]
    assert known["question"] == weights_hash(load_shapes()) != known["image"]
    load(folder, "cpu")
    write(1)
    with pytest.raises(
        ValueError, match=rf"encoder of 'image' was trained on the joint embedding {known['image']}, but"
    ):
        load(folder, "cpu")
    write(0)
    load(folder, "cpu")


def test_no_agent_is_lost_by_saving_another(tmp_path):
    out = tmp_path / "agent"
    first, other = (make_agent("ppo", VQA, seed=seed, **SMALL, **LITTLE["ppo"]) for seed in (0, 1))
    train(first, 64, out, progress=False)
    save(first, out)
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    for overwrite in (lambda: save(other, out), lambda: train(other, 64, out, progress=False)):
        with pytest.raises(ValueError, match="holds another agent: choose another folder, or load that one"):
            overwrite()
    assert before == {path.name: path.read_bytes() for path in out.glob("*.*")}
    again = load(out, "cpu")
    train(again, again.num_timesteps + 64, out, progress=False)
    assert load(out, "cpu").num_timesteps == again.num_timesteps


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        ("", ValueError, "out must be the path of a folder, got ''"),
        (3, TypeError, "out must be the path of a folder, got 3"),
        (__file__, ValueError, "out must be a folder"),
    ],
)
def test_what_is_no_folder_is_refused_before_anything_is_written(tmp_path, monkeypatch, out, error, says):
    monkeypatch.chdir(tmp_path)
    agent = make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"])
    for write in (save, lambda agent, out: train(agent, 64, out, progress=False)):
        with pytest.raises(error, match=re.escape(says)):
            write(agent, out)
    assert not list(tmp_path.iterdir()) and agent.num_timesteps == 0


def test_train_wants_an_agent():
    with pytest.raises(TypeError, match="agent must be one of make_agent or load, got 'x'"):
        train("x", 64)


def test_settings_by_numpy_numbers_are_saved(tmp_path):
    agent = make_agent(
        "ppo", VQA, seed=np.int64(3), n_steps=np.int64(8), batch_size=np.int32(1), clip_range=np.float32(0.25), imitation=np.float32(0.5),
        ent_coef=np.float32(0.5), net_arch=(np.int64(8),), normalize_advantage=False, max_grad_norm=np.inf, **SMALL,
    )  # fmt: skip
    train(agent, 64, tmp_path, progress=False)
    recipe = settings_of(load(tmp_path, "cpu")).recipe
    assert recipe == settings_of(agent).recipe and recipe["arguments"]["clip_range"] == 0.25


def test_an_agent_and_its_embedding_are_moved_together(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    save_joint(JointEmbedding(JointConfig(width=8, dim=8, text_depth=1)), one / "joint.safetensors", {})
    encoders = {"image": f"joint:{one}/joint.safetensors"}
    save(make_agent("ppo", VQA, encoders=encoders, **SMALL, **LITTLE["ppo"]), one / "agent")
    one.rename(other)
    found = settings_of(load(other / "agent", "cpu")).encoders
    assert found == {"image": f"joint:{other}/joint.safetensors"}
    (other / "joint.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"'joint:{one}/joint.safetensors' names no joint embedding"):
        load(other / "agent", "cpu")


def test_agents_load_from_another_folder_than_they_were_trained_in(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    save_joint(JointEmbedding(JointConfig(width=8, dim=8, text_depth=1)), tmp_path / "joint.safetensors", {})
    for folder, encoder in (("one", "joint:joint.safetensors"), ("two", "joint:.")):
        monkeypatch.chdir(tmp_path)
        save(make_agent("ppo", VQA, encoders={"image": encoder}, **SMALL, **LITTLE["ppo"]), folder)
        monkeypatch.chdir(tmp_path / "elsewhere")
        path = f"joint:{os.path.abspath('../' + encoder.removeprefix('joint:'))}"
        assert settings_of(load(f"../{folder}", "cpu")).encoders == {"image": path}


@pytest.mark.parametrize("steps", [0, -5, 1.5, "many"])
def test_steps_must_be_a_positive_integer(steps):
    agent = make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"])
    with pytest.raises((TypeError, ValueError), match="total_steps"):
        train(agent, steps, progress=False)


def test_interrupted_training_is_saved(tmp_path, monkeypatch):
    agent = make_agent("ppo", VQA, **SMALL, **LITTLE["ppo"])
    learn = type(agent).learn

    def interrupted(self, total, *args, **kwargs):
        learn(self, 64, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(agent), "learn", interrupted)
    assert not train(agent, 1000, tmp_path, progress=False)
    assert load(tmp_path, "cpu").num_timesteps == agent.num_timesteps > 0
