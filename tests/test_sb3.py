"""The native vector environments and the extractor inside Stable-Baselines3."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env as plain_make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

import mmenvs
from mmenvs.integrations.sb3 import MultimodalExtractor, MultimodalVecEnv, make_vec_env
from mmenvs.registry import SPECS

VQA = "MMRL/VQA-v0"


def policy_kwargs(**extractor):
    return {
        "features_extractor_class": MultimodalExtractor,
        "features_extractor_kwargs": {"width": 32, "features_dim": 32, **extractor},
    }


def channels_last(observation):
    return {
        name: value.transpose(0, 2, 3, 1) if name == "image" else value for name, value in observation.items()
    }


@pytest.mark.parametrize("id", SPECS)
def test_it_gives_what_the_native_environment_gives(id):
    n = 5
    adapter, native = make_vec_env(id, n, seed=3), gym.make_vec(id, num_envs=n)
    got, (expected, _) = adapter.reset(), native.reset(seed=3)
    generator = np.random.default_rng(0)
    returns, lengths, ends = np.zeros(n), np.zeros(n, int), 0
    for _ in range(30):
        for name, value in channels_last(got).items():
            np.testing.assert_array_equal(value, expected[name])
        actions = np.where(
            generator.random(n) < 0.5,
            native.oracle_actions(),
            generator.integers(adapter.action_space.n, size=n),
        )
        got, rewards, dones, infos = adapter.step(actions)
        expected, raw, terminated, truncated, native_infos = native.step(actions)
        np.testing.assert_allclose(rewards, raw, rtol=1e-6)
        np.testing.assert_array_equal(dones, terminated | truncated)
        returns, lengths = returns + raw, lengths + 1
        for row in range(n):
            if not dones[row]:
                assert "terminal_observation" not in infos[row]
                continue
            ends += 1
            info = infos[row]
            assert info["episode"]["r"] == pytest.approx(returns[row], abs=1e-5)
            assert info["episode"]["l"] == lengths[row]
            assert info["TimeLimit.truncated"] == (truncated[row] and not terminated[row])
            assert info["is_success"] == bool(native_infos["final_info"]["is_success"][row])
            final = native_infos["final_obs"][row]
            for name, value in info["terminal_observation"].items():
                np.testing.assert_array_equal(
                    value.transpose(1, 2, 0) if name == "image" else value, final[name]
                )
            returns[row], lengths[row] = 0.0, 0
    assert ends > n


def test_infos_are_separate_dicts():
    env = make_vec_env(VQA, 4, seed=0)
    env.reset()
    infos = env.step(np.zeros(4, np.int64))[3]
    assert len({id(info) for info in infos}) == 4


def test_seeding():
    first, second = make_vec_env(VQA, 3, seed=5).reset(), make_vec_env(VQA, 3, seed=5).reset()
    other = make_vec_env(VQA, 3, seed=50).reset()
    np.testing.assert_array_equal(first["image"], second["image"])
    assert not np.array_equal(first["image"], other["image"])
    env = make_vec_env(VQA, 3)
    assert env.seed(5) == [5, 6, 7]
    np.testing.assert_array_equal(env.reset()["image"], first["image"])


def test_attributes_methods_and_pictures():
    env = make_vec_env(VQA, 3, seed=0, difficulty=1, render_mode="rgb_array")
    env.reset()
    assert env.get_attr("difficulty") == [1, 1, 1]
    assert env.get_attr("num_envs", indices=[0]) == [3]
    with pytest.raises(AttributeError):
        env.get_attr("nothing")
    assert "question" in env.env_method("describe", indices=1)[0]
    actions = env.env_method("oracle_action")
    assert env.step(np.array(actions))[1].tolist() == [1.0, 1.0, 1.0]
    env.set_attr("note", "here")
    assert env.get_attr("note", indices=0) == ["here"]
    with pytest.raises(ValueError, match="all 3 rows"):
        env.set_attr("note", "there", indices=[0])
    assert env.env_is_wrapped(Monitor) == [True] * 3
    assert env.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    pictures = env.get_images()
    assert len(pictures) == 3 and pictures[0].dtype == np.uint8
    assert env.render().ndim == 3


def test_wrong_arguments():
    with pytest.raises(ValueError, match="CartPole"):
        make_vec_env("CartPole-v1", 2)
    with pytest.raises(ValueError, match="text"):
        make_vec_env(VQA, 2, text="string")
    with pytest.raises(ValueError, match="SameStep"):
        MultimodalVecEnv(gym.make_vec(VQA, num_envs=2, autoreset_mode="Disabled"))
    for what in (gym.make(VQA), None):
        with pytest.raises(TypeError, match="env must be a vector environment"):
            MultimodalVecEnv(what)
    with pytest.raises(TypeError, match=r"env must be a vector environment.*got None"):
        make_vec_env(VQA, 2, wrap=lambda envs: None)
    for seed, error in (("a", TypeError), (1.5, TypeError), (-5, ValueError)):
        with pytest.raises(error, match="seed must be"):
            make_vec_env(VQA, 2, seed=seed)
    with pytest.raises(ValueError, match="features_dim must be from 1"):
        MultimodalExtractor(gym.make(VQA).observation_space, features_dim=0)
    env = make_vec_env(VQA, 2, seed=0)
    with pytest.raises(ValueError, match="seed must be"):
        env.seed(-5)
    with pytest.raises(ValueError, match="options must have no keys"):
        env.set_options({"x": 1})
    env.set_options()
    env.reset()
    with pytest.raises(gym.error.InvalidAction):
        env.step(np.array([0, 10**6]))
    assert env.step(np.zeros(2, np.int64))[2].all()


def test_the_names_of_the_readme():
    assert mmenvs.MultimodalExtractor is MultimodalExtractor
    assert mmenvs.integrations.sb3.make_vec_env is make_vec_env


@pytest.mark.parametrize("fusion", ["concat", "weighted_sum", "cross_attention", "transformer"])
def test_ppo_learns_a_step_with_every_fusion(fusion):
    model = PPO(
        "MultiInputPolicy",
        make_vec_env(VQA, 8),
        n_steps=4,
        batch_size=16,
        n_epochs=1,
        seed=0,
        policy_kwargs=policy_kwargs(fusion=fusion),
    )
    before = model.policy.parameters_to_vector()
    model.learn(64)
    assert not np.array_equal(before, model.policy.parameters_to_vector())
    assert len(model.ep_success_buffer) > 0 and len(model.ep_info_buffer) > 0


@pytest.mark.parametrize("id", SPECS)
def test_ppo_on_every_task_and_predicting_raw_observations(id):
    model = PPO(
        "MultiInputPolicy", make_vec_env(id, 4), n_steps=4, batch_size=16, n_epochs=1, seed=0,
        policy_kwargs=policy_kwargs(),
    )  # fmt: skip
    model.learn(16)
    raw, _ = gym.make_vec(id, num_envs=6).reset(seed=0)
    ours = make_vec_env(id, 6, seed=0).reset()
    one, _ = model.predict(raw, deterministic=True)
    other, _ = model.predict(ours, deterministic=True)
    np.testing.assert_array_equal(one, other)
    mean, _ = evaluate_policy(model, make_vec_env(id, 4, seed=1), n_eval_episodes=4)
    assert 0.0 <= mean <= 1.0


@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_other_algorithms(algorithm):
    more = {"learning_starts": 8, "buffer_size": 64, "batch_size": 8} if algorithm is DQN else {}
    model = algorithm("MultiInputPolicy", make_vec_env(VQA, 4), policy_kwargs=policy_kwargs(), seed=0, **more)
    model.learn(40)
    assert model.num_timesteps >= 40


def test_plain_environments_work_with_the_extractor():
    env = plain_make_vec_env(VQA, n_envs=2, seed=0)
    model = PPO("MultiInputPolicy", env, n_steps=4, batch_size=8, n_epochs=1, policy_kwargs=policy_kwargs())
    model.learn(8)


def test_pictures_reach_the_encoder_in_one_scale():
    """Stable-Baselines3 scales single pictures and leaves sets of pictures: both must arrive in [0, 1]."""
    space = spaces.Dict(
        {
            "image": spaces.Box(0, 255, (3, 32, 32), np.uint8),
            "images": spaces.Box(0, 255, (2, 32, 32, 3), np.uint8),
        }
    )
    extractor = MultimodalExtractor(space, width=32)
    seen = {}
    for name, encoder in extractor.extractor.encoders.items():
        encoder.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].max().item()}))
    extractor({"image": torch.ones(1, 3, 32, 32), "images": torch.full((1, 2, 32, 32, 3), 255.0)})
    assert seen == {"image": 1.0, "images": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_cuda():
    model = PPO(
        "MultiInputPolicy", make_vec_env(VQA, 8), n_steps=4, batch_size=16, n_epochs=1, device="cuda",
        policy_kwargs=policy_kwargs(),
    )  # fmt: skip
    model.learn(32)
    assert model.device.type == "cuda"
