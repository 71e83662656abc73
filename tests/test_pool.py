"""Finite pools of scenes: what an index means, parity, and that nothing changes without one."""

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.registry import SPECS, task_class
from tests.test_env import every_id, every_level, every_split, same

IDS = sorted(SPECS)


def episodes(envs, seed, count):
    """Pool index and observation of the first episodes of every row."""
    found = []
    observation, _ = envs.reset(seed=seed)
    for _ in range(count):
        index = envs.task.pool_index
        found += [
            (int(index[i]), {k: v[i].copy() for k, v in observation.items()}) for i in range(envs.num_envs)
        ]
        observation, _ = envs.reset()
    return found


@every_id
@every_split
def test_an_index_is_one_observation_whatever_seed_row_and_pool_size(id, split):
    seen = {}
    for n, seed, pool_size in ((5, 0, 4), (8, 77, 4), (16, 3, 7)):
        for index, observation in episodes(
            gym.make_vec(id, num_envs=n, split=split, pool_size=pool_size), seed, 6
        ):
            assert 0 <= index < pool_size
            assert same(seen.setdefault(index, observation), observation)
    assert set(seen) == set(range(7))
    distinct = {b"".join(v.tobytes() for v in observation.values()) for observation in seen.values()}
    assert len(distinct) == 7


@every_id
def test_pools_of_splits_and_levels_share_nothing(id):
    pools = []
    for kwargs in ({}, {"split": "test"}, {"difficulty": 1}):
        found = episodes(gym.make_vec(id, num_envs=32, pool_size=16, **kwargs), 0, 4)
        pools.append({b"".join(v.tobytes() for v in observation.values()) for _, observation in found})
    assert not (pools[0] & pools[1] or pools[0] & pools[2] or pools[1] & pools[2])


@every_id
@every_level
def test_rows_equal_single_environments(id, difficulty):
    n, kwargs = 3, {"difficulty": difficulty, "pool_size": 5}
    envs = gym.make_vec(id, num_envs=n, **kwargs)
    singles = [gym.make(id, **kwargs) for _ in range(n)]
    observation, _ = envs.reset(seed=9)
    for i, env in enumerate(singles):
        assert same({k: v[i] for k, v in observation.items()}, env.reset(seed=9 + i)[0])
    for _ in range(12):
        actions = envs.oracle_actions()
        observation, rewards, ended, _, infos = envs.step(actions)
        for i, env in enumerate(singles):
            last, reward, end, _, _ = env.step(int(actions[i]))
            assert (rewards[i], ended[i]) == (reward, end)
            if end:
                assert same(infos["final_obs"][i], last)
                last, _ = env.reset()
            assert same({k: v[i] for k, v in observation.items()}, last)
            assert env.unwrapped.task.pool_index[0] == envs.task.pool_index[i]


@every_id
def test_every_item_is_drawn_about_equally(id):
    envs = gym.make_vec(id, num_envs=500, pool_size=10)
    envs.reset(seed=0)
    counts = np.bincount(envs.task.pool_index, minlength=10)
    assert len(counts) == 10 and counts.min() > 20  # 50 expected; 20 is over four deviations away


@settings(max_examples=20, deadline=None)
@given(id=st.sampled_from(IDS), pool_size=st.integers(1, 2**31 - 1), seed=st.integers(0, 2**64))
def test_any_size(id, pool_size, seed):
    env = gym.make(id, pool_size=pool_size)
    observation, _ = env.reset(seed=seed)
    assert env.observation_space.contains(observation)
    assert 0 <= env.unwrapped.task.pool_index[0] < pool_size


@every_id
def test_a_pool_of_one_repeats_itself(id):
    found = episodes(gym.make_vec(id, num_envs=3, pool_size=1), 0, 3)
    assert all(same(found[0][1], observation) for _, observation in found)


@every_id
def test_without_a_pool_there_is_no_index(id):
    envs = gym.make_vec(id, num_envs=3)
    envs.reset(seed=0)
    assert envs.task.pool_index.tolist() == [-1] * 3


@every_id
@pytest.mark.parametrize(
    ("pool_size", "error"),
    [(0, ValueError), (-1, ValueError), (2**31, ValueError), (2.0, TypeError), (True, TypeError)],
)
def test_bad_sizes_are_named(id, pool_size, error):
    with pytest.raises(error, match="pool_size"):
        task_class(id)(1, pool_size=pool_size)


@pytest.mark.parametrize("id", ["MMRL/VQA-v0", "MMRL/Captioning-v0"])
def test_a_source_is_its_own_pool(id):
    with pytest.raises(ValueError, match="pool_size must be None with a source"):
        task_class(id)(1, pool_size=3, source=object())
    with pytest.raises(
        ValueError, match="difficulty must be 0 with a source, whose pictures have none, got 2"
    ):
        task_class(id)(1, difficulty=2, source=object())
