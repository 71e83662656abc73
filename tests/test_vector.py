"""The native vector environment: parity with single ones and with Gymnasium's own, autoreset, robustness."""

import copy
import json
import pickle
import threading
import time
import weakref

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from tests.test_env import every_id, every_level, every_split, same

N = 4


def vector_kwargs(mode):
    return {"vector_kwargs": {"autoreset_mode": mode}}


def rows_of(batch):
    return [row.tobytes() for row in batch]


def play(envs, steps, generator, lead=None):
    """Reset and act at random, sometimes as the oracle; every answer of the environment."""
    result = [envs.reset(seed=21)]
    actions = []
    for t in range(steps):
        action = (
            generator.integers(envs.single_action_space.n, size=envs.num_envs) if lead is None else lead[t]
        )
        if lead is None and t % 3 == 0:
            action = envs.oracle_actions()
        actions.append(action)
        result.append(envs.step(action))
    return result, actions


@every_id
@every_level
def test_rows_equal_single_environments(id, difficulty):
    envs = gym.make_vec(id, num_envs=N, difficulty=difficulty)
    results, actions = play(envs, 40, np.random.default_rng(0))
    for i in range(N):
        env = gym.make(id, difficulty=difficulty)
        observation, info = env.reset(seed=21 + i)
        row = {k: v[i] for k, v in results[0][0].items()}
        assert same(row, observation)
        for action, (got, rewards, terminated, truncated, infos) in zip(actions, results[1:], strict=True):
            observation, reward, end, cut, info = env.step(int(action[i]))
            assert (rewards[i], terminated[i], truncated[i]) == (reward, end, cut)
            if end or cut:
                assert same(infos["final_obs"][i], observation)
                assert all(infos["final_info"][k][i] == v for k, v in info.items())
                observation, info = env.reset()
            assert same({k: v[i] for k, v in got.items()}, observation)
            assert all(infos[k][i] == v and infos[f"_{k}"][i] for k, v in info.items())


@every_id
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("max_episode_steps", [None, 2])
def test_equal_to_sync(id, mode, max_episode_steps):
    native = gym.make_vec(id, num_envs=N, autoreset_mode=mode, max_episode_steps=max_episode_steps)
    sync = gym.make_vec(
        id, num_envs=N, vectorization_mode="sync", max_episode_steps=max_episode_steps, **vector_kwargs(mode)
    )
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    results, actions = play(native, 40, np.random.default_rng(1))
    expected, _ = play(sync, 40, None, actions)
    for got, wanted in zip(results, expected, strict=True):
        assert same(got, wanted)


@every_id
def test_equal_to_async(id):
    native = gym.make_vec(id, num_envs=N)
    other = gym.make_vec(id, num_envs=N, vectorization_mode="async", **vector_kwargs(AutoresetMode.SAME_STEP))
    results, actions = play(native, 20, np.random.default_rng(2))
    expected, _ = play(other, 20, None, actions)
    other.close()
    for got, wanted in zip(results, expected, strict=True):
        assert same(got, wanted)


@every_id
def test_disabled_autoreset_equal_to_sync(id):
    mode = AutoresetMode.DISABLED
    native = gym.make_vec(id, num_envs=N, autoreset_mode="Disabled")
    sync = gym.make_vec(id, num_envs=N, vectorization_mode="sync", **vector_kwargs(mode))
    assert same(native.reset(seed=3), sync.reset(seed=3))
    generator = np.random.default_rng(0)
    for t in range(40):
        actions = (
            native.oracle_actions() if t % 2 else generator.integers(native.single_action_space.n, size=N)
        )
        got, wanted = native.step(actions), sync.step(actions)
        assert same(got, wanted)
        ended = got[2] | got[3]
        if ended.any():
            with pytest.raises(gym.error.ResetNeeded, match="reset_mask"):
                native.step(actions)
            mask = {"reset_mask": ended}
            assert same(native.reset(options=dict(mask)), sync.reset(options=dict(mask)))


@every_id
@every_split
def test_every_split_and_row_of_its_own(id, split):
    envs = gym.make_vec(id, num_envs=64, split=split)
    observation, _ = envs.reset(seed=0)
    assert len({b"".join(parts) for parts in zip(*map(rows_of, observation.values()), strict=True)}) > 60


@every_id
def test_pickle_and_deepcopy(id):
    envs = gym.make_vec(id, num_envs=N)
    envs.reset(seed=0)
    envs.step(envs.oracle_actions())
    twins = [envs, copy.deepcopy(envs), pickle.loads(pickle.dumps(envs))]
    results = [[twin.step(twin.oracle_actions()) for _ in range(3)] for twin in twins]
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], result, strict=True))


@every_id
def test_observations_that_are_kept_never_change(id):
    envs = gym.make_vec(id, num_envs=N)
    kept = [envs.reset(seed=0)[0]]
    copies = [copy.deepcopy(kept[0])]
    for _ in range(12):
        observation = envs.step(envs.oracle_actions())[0]
        kept.append({k: v[1:2] for k, v in observation.items()})
        copies.append(copy.deepcopy(kept[-1]))
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


@every_id
@pytest.mark.parametrize(
    "actions",
    [
        np.full(N, -1),
        np.full(N, 10**6),
        np.full(N, 0.0),
        np.full(N, np.nan),
        np.zeros(N + 1, int),
        np.zeros((N, 1), int),
        [None] * N,
        "yes",
        0,
    ],
)
def test_bad_actions_leave_everything_as_it_was(id, actions):
    envs, twin = (gym.make_vec(id, num_envs=N) for _ in range(2))
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(np.zeros(N, int))
    envs.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match="actions must be"):
        envs.step(actions)
    assert same(envs.step(envs.oracle_actions()), twin.step(twin.oracle_actions()))


@every_id
@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda e: e.reset(seed=[1, 2]), ValueError, "num_envs=4"),
        (lambda e: e.reset(seed=[1, 2, 3, -4]), ValueError, "non-negative"),
        (lambda e: e.reset(seed=[np.nan, 1, 2, 3]), ValueError, "non-negative integer.*got nan"),
        (lambda e: e.reset(seed=1.5), ValueError, "non-negative integer.*got 1.5"),
        (lambda e: e.reset(seed="1234"), ValueError, "non-negative integer.*got '1234'"),
        (lambda e: e.reset(seed=np.array(3)), ValueError, "non-negative integer.*got array"),
        (lambda e: e.reset(seed=True), ValueError, "non-negative integer.*got True"),
        (lambda e: e.reset(options={"reset_mask": [True] * N}), TypeError, "bool array"),
        (lambda e: e.reset(options={"reset_mask": np.zeros(N, bool)}), ValueError, "one True"),
        (lambda e: e.reset(options={"reset_mask": np.ones(2, bool)}), ValueError, "shape"),
        (lambda e: e.describe(N), ValueError, "row"),
    ],
)
def test_bad_resets_are_named(id, call, error, says):
    envs, twin = (gym.make_vec(id, num_envs=N) for _ in range(2))
    envs.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(error, match=says):
        call(envs)
    assert same(envs.reset(), twin.reset())  # the streams go on as if nothing had been asked
    envs.step(envs.oracle_actions())


def test_bad_construction_is_named():
    from mmenvs.tasks.vqa import VQA
    from mmenvs.vector import MultimodalVectorEnv

    for kwargs, says in (
        ({"num_envs": 0}, "num_envs"),
        ({"autoreset_mode": "never"}, "autoreset_mode"),
        ({"max_episode_steps": 0}, "max_episode_steps"),
    ):
        with pytest.raises(ValueError, match=says):
            MultimodalVectorEnv(VQA, **kwargs)


@every_id
def test_seeds_per_row_and_without_seed(id):
    envs = gym.make_vec(id, num_envs=3)
    assert same(envs.reset(seed=np.int64(3)), gym.make_vec(id, num_envs=3).reset(seed=3))
    envs = gym.make_vec(id, num_envs=3)
    several, _ = envs.reset(seed=[5, None, 5])
    assert all(same(v[0], v[2]) for v in several.values())
    unseeded = gym.make_vec(id, num_envs=3, difficulty=1)  # at 0 one pair in 12,000 is the same
    observation, _ = unseeded.reset()
    assert len({b"".join(parts) for parts in zip(*map(rows_of, observation.values()), strict=True)}) == 3


@every_id
def test_render_shows_every_row(id):
    envs = gym.make_vec(id, num_envs=2, render_mode="rgb_array")
    envs.reset(seed=0)
    pictures = envs.render()
    assert len(pictures) == 2
    assert all(p.dtype == np.uint8 and p.ndim == 3 and p.std() > 0 for p in pictures)


def test_what_is_handed_out_may_be_written_into():
    envs, twin = (gym.make_vec("MMRL/Captioning-v0", num_envs=3) for _ in range(2))
    envs.reset(seed=0)
    twin.reset(seed=0)
    for _ in range(40):
        actions = twin.oracle_actions()
        first, second = envs.step(actions), twin.step(actions)
        for name in ("image", "caption"):
            assert np.array_equal(first[0][name], second[0][name])
        if "final_obs" in first[4]:
            for row in np.flatnonzero(first[4]["_final_obs"]):
                assert np.array_equal(
                    first[4]["final_obs"][row]["image"], second[4]["final_obs"][row]["image"]
                )
        first[0]["image"][:] = 7


def test_rows_that_only_reset_ignore_their_action():
    envs = gym.make_vec("MMRL/VQA-v0", num_envs=2, autoreset_mode="NextStep")
    envs.reset(seed=0)
    envs.step(np.zeros(2, np.int64))
    _, rewards, *_ = envs.step(np.array([99, 99]))
    assert (rewards == 0).all()


def test_a_reward_function_that_fails_leaves_the_environment_working():
    failing = [True]

    def reward(*_, **__):
        if failing[0]:
            raise RuntimeError("no score today")
        return np.ones(2)

    envs = gym.make_vec("MMRL/Captioning-v0", num_envs=2, reward=reward)
    envs.reset(seed=0)
    end = np.full(2, 3)
    for _ in range(30):
        with pytest.raises(RuntimeError, match="no score today"):
            envs.step(end)
    failing[0] = False
    assert envs.step(end)[2].all()


def made(infos):
    # As compiled code reads a dict, past the methods of its class.
    return isinstance(dict.__getitem__(infos, "final_obs"), np.ndarray)


def late_and_plain():
    """The infos of the same step, once as they are handed out, once as a plain dict made from them."""
    infos = []
    for _ in range(2):
        envs = gym.make_vec("MMRL/VQA-v0", num_envs=N)
        envs.reset(seed=3)
        infos.append(envs.step(np.zeros(N, np.int64))[4])
    late, other = infos
    assert not made(late)
    plain = dict(other)
    assert type(plain) is dict and plain["final_obs"].shape == (N,)
    assert all(set(row) == {"image", "question"} for row in plain["final_obs"])
    return late, plain


# Each read or change of a dict there is, as something that can be compared.
DICT_USES = {
    "__contains__": lambda d: "final_obs" in d,
    "__delitem__": lambda d: (d.__delitem__("final_obs"), dict(d)),
    "__eq__": lambda d: d == {},
    "__getitem__": lambda d: d["final_obs"],
    "__ior__": lambda d: dict(d.__ior__({"episode": 1})),
    "__iter__": lambda d: [d[key] for key in d],
    "__len__": len,
    "__ne__": lambda d: d != {},
    "__or__": lambda d: d | {"episode": 1},
    "__repr__": repr,
    "__reversed__": lambda d: [d[key] for key in reversed(d)],
    "__ror__": lambda d: {"episode": 1} | d,
    "__setitem__": lambda d: (d.__setitem__("final_obs", 1), d.__setitem__("episode", 2), dict(d)),
    "clear": lambda d: (d.clear(), dict(d)),
    "copy": lambda d: d.copy(),
    "get": lambda d: (d.get("final_obs"), d.get("episode"), d.get("episode", 5)),
    "items": lambda d: list(d.items()),
    "keys": lambda d: list(d.keys()),
    "pop": lambda d: (d.pop("final_obs"), d.pop("final_obs", 3), dict(d)),
    "popitem": lambda d: ([d.popitem() for _ in range(len(d))], dict(d)),
    "setdefault": lambda d: (d.setdefault("final_obs", 1), d.setdefault("episode", 1), dict(d)),
    "update": lambda d: (d.update(final_obs=1), dict(d)),
    "values": lambda d: list(d.values()),
    "dict()": dict,
    "update of another": lambda d: (other := {}, other.update(d))[0],
    "**": lambda d: (lambda **keywords: keywords)(**{**d}),
    "copy.copy": copy.copy,
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
    "json": lambda d: len(json.dumps(d, default=np.ndarray.tolist)),
}


@pytest.mark.parametrize("use", DICT_USES)
def test_infos_are_a_dict_in_every_use(use):
    late, plain = late_and_plain()
    assert same(DICT_USES[use](late), DICT_USES[use](plain))


def test_no_use_of_a_dict_is_forgotten():
    of_objects = set(dir(object)) - {"__eq__", "__ne__", "__repr__"}
    assert set(dir(dict)) - of_objects - {"__class_getitem__", "fromkeys"} <= set(DICT_USES)


def test_final_obs_is_put_together_only_when_it_is_read():
    late, plain = late_and_plain()
    assert "final_obs" in late and late.get("is_success") is not None and len(late) == len(plain)
    late["episode"] = {"r": late["_final_obs"]}
    assert not made(late)
    final = late["final_obs"]
    assert made(late) and late["final_obs"] is final
    final[0] = None  # what a wrapper puts there stays
    assert late["final_obs"][0] is None and dict(late)["final_obs"] is final


def test_code_that_reads_past_the_methods_of_a_dict_finds_what_acts_as_the_array():
    late, plain = late_and_plain()
    found, expected = dict.__getitem__(late, "final_obs"), plain["final_obs"]
    assert (len(found), found.shape, found.dtype) == (N, (N,), object)
    assert same(list(found), list(expected)) and same(found[1], expected[1])
    assert same(np.asarray(found), expected) and same(np.array(found), expected)
    assert same(copy.copy(found), expected) and same(pickle.loads(pickle.dumps(found)), expected)
    found[0] = None
    assert late["final_obs"][0] is None and late["final_obs"] is found.array()


def test_threads_that_read_at_once_find_the_same_array():
    late, _ = late_and_plain()
    held, gate = dict.__getitem__(late, "final_obs"), threading.Barrier(4)
    make = held._make
    calls = []
    held._make = lambda: (calls.append(1), time.sleep(0.05), make())[-1]
    found = []
    threads = [
        threading.Thread(target=lambda: (gate.wait(5), found.append(late["final_obs"]))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert len(calls) == 1 and len(found) == 4
    assert all(each is found[0] for each in found) and found[0][0] is not None


def test_infos_that_nobody_reads_keep_no_environment():
    envs = gym.make_vec("MMRL/VQA-v0", num_envs=N)
    envs.reset(seed=3)
    infos = envs.step(np.zeros(N, np.int64))[4]
    gone = weakref.ref(envs)
    del envs
    assert gone() is None and infos["final_obs"][0]["image"].any()


def test_strings_of_the_rows_that_ended_equal_sync():
    n = 64  # some end and some go on
    native = gym.make_vec("MMRL/Captioning-v0", num_envs=n, text="string")
    sync = gym.make_vec(
        "MMRL/Captioning-v0",
        num_envs=n,
        vectorization_mode="sync",
        text="string",
        **vector_kwargs(AutoresetMode.SAME_STEP),
    )
    generator, ends = np.random.default_rng(0), 0
    assert same(native.reset(seed=1), sync.reset(seed=1))
    for _ in range(12):
        actions = generator.integers(native.single_action_space.n, size=n)
        got, wanted = native.step(actions), sync.step(actions)
        ends += 0 < got[2].sum() < n
        assert same(got, wanted)
    assert ends > 3


def test_final_obs_read_late_is_that_of_its_step():
    envs = gym.make_vec("MMRL/Captioning-v0", num_envs=N, max_episode_steps=3)
    again = gym.make_vec("MMRL/Captioning-v0", num_envs=N, max_episode_steps=3)
    kept, expected = [], []
    envs.reset(seed=3), again.reset(seed=3)
    for t in range(7):
        actions = np.arange(N) + t + 3
        kept.append(envs.step(actions)[4])
        expected.append(copy.deepcopy(again.step(actions)[4]))
    assert sum("final_obs" in infos for infos in kept) >= 2
    assert same(kept, expected)


@pytest.mark.parametrize(
    "wrap", [gym.wrappers.vector.RecordEpisodeStatistics, gym.wrappers.vector.DictInfoToList]
)
def test_wrappers_of_gymnasium_find_what_they_look_for(wrap):
    native = gym.make_vec("MMRL/VQA-v0", num_envs=N)
    sync = gym.make_vec(
        "MMRL/VQA-v0", num_envs=N, vectorization_mode="sync", **vector_kwargs(AutoresetMode.SAME_STEP)
    )
    ours, theirs = (wrap(envs) for envs in (native, sync))
    ours.reset(seed=3), theirs.reset(seed=3)
    for _ in range(3):
        got, wanted = (envs.step(np.ones(N, np.int64)) for envs in (ours, theirs))
        for infos in (got[4], wanted[4]):
            for part in infos if isinstance(infos, list) else [infos]:
                part.get("episode", {}).pop("t", None)  # seconds
        assert same(got, wanted)
