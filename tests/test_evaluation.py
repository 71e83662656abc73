"""Scores of agents: the episodes, the intervals, the errors."""

from __future__ import annotations

import json

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmenvs_agents.evaluation import Rate, evaluate
from mmenvs_agents.sb3 import make_agent

VQA = "MMRL/VQA-v0"
CAPTIONING = "MMRL/Captioning-v0"


class Fixed:
    """Answers every question alike and remembers what it was shown."""

    def __init__(self, action: int) -> None:
        self.action = action
        self.starts: list[np.ndarray] = []
        self.states: list[object] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.starts.append(np.array(episode_start))
        self.states.append(state)
        return np.full(len(observation["image"]), self.action), len(self.states)


def test_wilson_interval_against_known_values():
    rate = Rate.of(np.arange(20) < 15)  # 15 of 20, by hand from Wilson's formula
    assert (rate.value, rate.n) == (0.75, 20)
    assert (rate.low, rate.high) == pytest.approx((0.5313, 0.8881), abs=1e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_wilson_interval_holds_the_value(successes):
    rate = Rate.of(np.array(successes))
    assert 0 <= rate.low <= rate.value <= rate.high <= 1
    assert rate.high - rate.low > 0


def test_oracle_and_random():
    oracle, random = (evaluate(agent, VQA, episodes=300) for agent in ("oracle", "random"))
    assert oracle.success.value == oracle.mean_return == oracle.return_low == 1.0
    assert random.success.high < 0.15
    assert sum(rate.n for rate in oracle.by_type.values()) == 300
    assert {kind: rate.n for kind, rate in oracle.by_type.items()} == {
        kind: rate.n for kind, rate in random.by_type.items()
    }


@pytest.mark.parametrize(("episodes", "num_envs"), [(1, 64), (7, 3), (64, 64), (65, 64)])
def test_each_episode_is_that_of_its_row_and_seed(episodes, num_envs):
    result = evaluate(Fixed(1), VQA, episodes=episodes, num_envs=num_envs, seed=5)
    assert result.returns.shape == result.successes.shape == (episodes,)
    num_envs = min(num_envs, episodes)
    returns = []
    env = gym.make(VQA, split="test")
    for row in range(num_envs):
        for episode in range(episodes // num_envs + (row < episodes % num_envs)):
            env.reset(seed=5 + row if episode == 0 else None)
            returns.append(env.step(1)[1])
    assert result.returns.tolist() == returns
    assert result.success.value == np.mean(returns)


def test_long_episodes_count_like_short_ones():
    result = evaluate("oracle", CAPTIONING, episodes=50, num_envs=16)
    assert result.success.value == 1.0 and result.mean_return == pytest.approx(1.0)
    assert result.mean_length > 2
    assert result.by_type == {}


def test_state_and_episode_starts_reach_the_agent():
    agent = Fixed(3)  # the end token: every caption is empty
    result = evaluate(agent, CAPTIONING, episodes=8, num_envs=4)
    assert result.mean_length == 1.0
    assert agent.states == [None, 1]
    assert all(starts.all() for starts in agent.starts)


def test_a_result_repeats_and_depends_on_the_seed():
    one, again, other = (evaluate(Fixed(0), VQA, episodes=200, seed=seed) for seed in (0, 0, 1000))
    a, b = one.to_dict(), again.to_dict()
    assert a.pop("seconds") > 0 and b.pop("seconds") > 0
    assert a == b
    assert one.returns.tolist() == again.returns.tolist() != other.returns.tolist()


def test_json_holds_all_but_the_episodes():
    result = evaluate("oracle", VQA, split="val", episodes=20, env_kwargs={"difficulty": 2, "split": "train"})
    read = json.loads(result.to_json())
    assert read == result.to_dict()
    assert (read["split"], read["difficulty"], read["episodes"], read["success"]["value"]) == (
        "val",
        2,
        20,
        1.0,
    )
    assert "returns" not in read


def test_a_plain_function_is_an_agent():
    agent = Fixed(0)
    assert evaluate(agent.predict, VQA, episodes=10).to_dict()["episodes"] == 10


def test_an_agent_of_another_environment_is_named():
    agent = make_agent("ppo", VQA, num_envs=2, features_dim=8, fusion="concat", encoders={}, device="cpu")
    with pytest.raises(ValueError, match=f"agent must fit {CAPTIONING}, which has no question for it to see"):
        evaluate(agent, CAPTIONING, episodes=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"id": "MMRL/VQ-v0"}, gym.error.NameNotFound, "did you mean MMRL/VQA-v0"),
        ({"split": "dev"}, ValueError, "split must be one of 'train', 'val', 'test', 'compositional'"),
        ({"episodes": 0}, ValueError, "episodes must be from 1"),
        ({"episodes": 2.5}, TypeError, "episodes must be an integer"),
        ({"num_envs": 0}, ValueError, "num_envs must be from 1"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
        ({"agent": "best"}, ValueError, "agent must be one of 'random', 'most_frequent', 'oracle'"),
        ({"agent": 3}, TypeError, "agent must have a predict method"),
        ({"env_kwargs": {"difficulty": 9}}, ValueError, "difficulty must be from 0 to 3"),
        ({"env_kwargs": {"colour": 1}}, TypeError, "colour"),
        ({"env_kwargs": 3}, TypeError, "env_kwargs must be a dict of arguments of the environment, got 3"),
        ({"deterministic": "x"}, TypeError, "deterministic must be True or False, got 'x'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"agent": "random", "id": VQA, "episodes": 4, **change}
    with pytest.raises(error, match=message):
        evaluate(**arguments)
