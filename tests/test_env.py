"""What every environment of the suite promises, for all ids, splits and levels."""

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import mmenvs
from mmenvs.env import MultimodalEnv, seed_word
from mmenvs.registry import task_class
from mmenvs.tasks.base import Task
from mmenvs.vector import MultimodalVectorEnv
from mmenvs.world.scene import SPLITS

IDS = sorted(id for id in mmenvs.SPECS if id.startswith("MMRL/"))
every_id = pytest.mark.parametrize("id", IDS)
every_split = pytest.mark.parametrize("split", SPLITS)
every_level = pytest.mark.parametrize("difficulty", range(4))


def same(a, b):
    """Equal to the byte, with the same types, however deep; dicts in any order of keys."""
    if isinstance(a, dict):
        return isinstance(b, dict) and set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list) or (isinstance(a, np.ndarray) and a.dtype == object):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b


def rollout(env, seed, steps, generator):
    result = [env.reset(seed=seed)]
    for _ in range(steps):
        action = int(generator.integers(env.action_space.n))
        result.append(env.step(action))
        if result[-1][2] or result[-1][3]:
            result.append(env.reset())
    return result


@every_id
@every_level
def test_checker_finds_nothing(id, difficulty):
    env = gym.make(id, difficulty=difficulty, render_mode="rgb_array", disable_env_checker=True)
    check_env(env.unwrapped)
    assert env.unwrapped.render().dtype == np.uint8


@every_id
@every_split
def test_same_seed_same_rollout(id, split):
    runs = [rollout(gym.make(id, split=split), 7, 12, np.random.default_rng(0)) for _ in range(2)]
    assert same(*runs)
    other = rollout(gym.make(id, split=split), 8, 12, np.random.default_rng(0))
    assert not same(runs[0], other)


@every_id
def test_neighbouring_seeds_share_no_episode(id):
    def first_words(seed):
        env = gym.make(id)
        episodes = []
        env.reset(seed=seed)
        for _ in range(30):
            observation, _ = env.reset()
            episodes.append(b"".join(value.tobytes() for value in observation.values()))
        return set(episodes)

    assert not first_words(0) & first_words(1)


@every_id
def test_pickle_and_deepcopy_go_on_as_the_original(id):
    env = gym.make(id, difficulty=1)
    env.reset(seed=3)
    twins = [env, copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    runs = []
    for twin in twins:
        runs.append([twin.step(1), twin.reset(), twin.step(0)])
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


@every_id
@every_split
@every_level
def test_oracle_reaches_the_upper_bound(id, split, difficulty):
    envs = gym.make_vec(id, num_envs=32, split=split, difficulty=difficulty)
    envs.reset(seed=11)
    finished = np.zeros(32, int)
    for _ in range(200):
        _, rewards, ended, _, infos = envs.step(envs.oracle_actions())
        assert np.allclose(rewards[ended], mmenvs.SPECS[id].max_score)
        if ended.any():
            assert infos["final_info"]["is_success"][ended].all()
        finished += ended
        if (finished >= 2).all():
            return
    pytest.fail(f"episodes did not end: {finished}")


@every_id
@every_level
def test_random_agent_is_near_chance(id, difficulty):
    envs = gym.make_vec(id, num_envs=256, difficulty=difficulty)
    envs.reset(seed=1)
    generator, scores = np.random.default_rng(0), []
    for _ in range(60):
        _, rewards, ended, _, _ = envs.step(generator.integers(envs.single_action_space.n, size=256))
        scores.extend(rewards[ended])
    # One of K pictures, of 34 answers, or a caption of random words.
    assert np.mean(scores) < {"MMRL/AudioVisualMatching-v0": 0.29}.get(id, 0.12)


@every_id
def test_infos_have_constant_keys_and_hide_the_answer(id):
    env = gym.make(id)
    _, info = env.reset(seed=0)
    keys, ended = list(info), False
    while not ended:
        assert info["is_success"] is False
        assert {info.get("answer", -1), info.get("reference", -1)} == {-1}
        assert not {"answer", "reference"} & set(env.unwrapped.describe())
        _, _, ended, _, info = env.step(env.unwrapped.oracle_action())
        assert list(info) == keys
    assert info["is_success"] is True
    assert {"answer", "reference"} & set(env.unwrapped.describe())
    assert not {"episode", "final_obs", "final_info", "terminal_observation"} & set(keys)


@every_id
def test_nothing_but_the_stream_is_random(id):
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    env = gym.make(id)
    state = env.unwrapped.task.streams.copy()
    env.reset(seed=5)
    env.step(0)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert not state.any()


@every_id
def test_observation_stays_as_it_was(id):
    env = gym.make(id)
    first, _ = env.reset(seed=0)
    kept = copy.deepcopy(first)
    env.step(1)
    env.reset()
    assert same(first, kept)


@every_id
def test_text_as_strings(id):
    env = gym.make(id, text="string")
    check_env(env.unwrapped, skip_render_check=True)
    envs = gym.make_vec(id, num_envs=3, text="string")
    observation, _ = envs.reset(seed=0)
    single, _ = env.reset(seed=0)
    for key, value in single.items():
        assert same(observation[key][0], value)


@settings(max_examples=25, deadline=None)
@given(
    id=st.sampled_from(IDS),
    half=st.integers(16, 128),
    difficulty=st.integers(0, 3),
    split=st.sampled_from(SPLITS),
    seed=st.integers(0, 2**70),
)
def test_any_setting_gives_members_of_its_spaces(id, half, difficulty, split, seed):
    env = gym.make(id, image_size=2 * half, difficulty=difficulty, split=split, disable_env_checker=True)
    observation, _ = env.reset(seed=seed)
    assert env.observation_space.contains(observation)
    action = env.unwrapped.oracle_action()
    assert env.action_space.contains(action)
    assert env.observation_space.contains(env.step(action)[0])


@every_id
@pytest.mark.parametrize(
    "kwargs, error, says",
    [
        ({"difficulty": 4}, ValueError, "difficulty must be from 0 to 3, got 4"),
        ({"difficulty": "hard"}, TypeError, "difficulty"),
        ({"difficulty": True}, TypeError, "difficulty"),
        ({"split": "dev"}, ValueError, "'compositional'"),
        ({"image_size": 31}, ValueError, "image_size must be from 32 to 512, got 31"),
        ({"image_size": 33}, ValueError, "even"),
        ({"image_size": 64.0}, TypeError, "image_size"),
        ({"text": "words"}, ValueError, "text must be one of 'ids', 'string'"),
        ({"render_mode": "ascii"}, ValueError, "render_mode"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_settings_are_named(id, kwargs, error, says):
    with pytest.raises(error, match=re.escape(says)):
        mmenvs.env.MultimodalEnv(mmenvs.SPECS[id].task, **kwargs)
    with pytest.raises(error, match=re.escape(says)):
        mmenvs.vector.MultimodalVectorEnv(mmenvs.SPECS[id].task, 2, **kwargs)


@every_id
@pytest.mark.parametrize("action", [-1, 10**6, 0.5, float("nan"), "yes", None, [0], True])
def test_bad_actions_are_named_and_change_nothing(id, action):
    env = gym.make(id).unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)
    env.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match="action must be an integer from 0 to"):
        env.step(action)
    env.step(env.oracle_action())


@every_id
def test_step_after_the_end_is_an_error(id):
    env = gym.make(id).unwrapped
    env.reset(seed=0)
    ended = False
    while not ended:
        ended = env.step(env.oracle_action())[2]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(0)


@every_id
def test_docstring_holds_to_the_code(id):
    cls = task_class(id)
    doc = cls.__doc__
    for heading in (
        "Description",
        "Observation Space",
        "Action Space",
        "Rewards",
        "Starting State",
        "Episode End",
        "Information",
        "Arguments",
        "References",
        "Version History",
    ):
        assert f"## {heading}\n" in doc, heading
    task: Task = cls(1)

    def table(heading):
        part = doc.split(f"## {heading}\n")[1].split("## ")[0]
        rows = re.findall(r"^\s*\| (`\w+`(?:, `\w+`)*) \| `?([^|`]+)`? \|", part, re.M)
        return [(key, kind) for keys, kind in rows for key in re.findall(r"\w+", keys)]

    assert {key for key, _ in table("Observation Space")} == set(task.observation_space)
    for key, space in table("Observation Space"):
        assert str(task.observation_space[key].dtype) in space
    assert {key: kind.strip() for key, kind in table("Information")} == {
        key: kind.__name__ for key, kind in task.info_types.items()
    }
    assert f"Discrete({task.action_space.n})" in doc.split("## Action Space\n")[1].split("## ")[0]
    arguments = doc.split("## Arguments\n")[1].split("## ")[0]
    import inspect

    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if name not in ("self", "num_envs"):
            default = parameter.default
            shown = f'"{default}"' if isinstance(default, str) else default
            assert f"`{name}={shown}`" in arguments


def test_import_is_light():
    code = "import sys, mmenvs; print([m for m in ('torch', 'transformers', 'stable_baselines3') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_make_imports_the_package_by_itself():
    code = "import gymnasium as gym; gym.make('mmenvs:MMRL/VQA-v0').reset(seed=0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_id_names_the_nearest():
    for id, near in (("MMRL/VQ-v0", "VQA"), ("vqa", "VQA"), ("MMRL/Captions-v0", "Captioning")):
        with pytest.raises(gym.error.NameNotFound, match=f"did you mean MMRL/{near}-v0"):
            task_class(id)
    with pytest.raises(
        gym.error.NameNotFound, match="'CartPole-v1' is not in the suite; there are MMRL/VQA-v0"
    ):
        task_class("CartPole-v1")


@given(st.integers(2**64 - 3, 2**70), st.integers(0, 2**20))
def test_seeds_beyond_64_bits_have_episodes_of_their_own(seed, other):
    words = {seed_word(seed), seed_word(seed + 1), seed_word(other), seed_word(seed % 2**64 + 2**80)}
    assert len(words) == 4 and seed_word(other) == other
    env, envs = gym.make("MMRL/VQA-v0"), gym.make_vec("MMRL/VQA-v0", num_envs=2)
    batch, _ = envs.reset(seed=seed)
    for row in range(2):
        for name, value in env.reset(seed=seed + row)[0].items():
            np.testing.assert_array_equal(value, batch[name][row])


@every_id
def test_unknown_reset_options_are_named(id):
    for env in (gym.make(id), gym.make_vec(id, num_envs=2)):
        with pytest.raises(ValueError, match="reset_maks"):
            env.reset(seed=0, options={"reset_maks": None})
        env.reset(seed=0, options={})


def test_register_refuses_what_is_no_task_and_ids_that_are_taken():
    with pytest.raises(ValueError, match="is taken"):
        mmenvs.register("MMRL/VQA-v0", task_class("MMRL/Captioning-v0"))
    with pytest.raises(ValueError, match="is taken"):
        mmenvs.register("MMRL/VQA-v0", task_class("MMRL/VQA-v0"), kwargs={"difficulty": 3})
    with pytest.raises(TypeError, match=r"must be a subclass of mmenvs.tasks.base.Task, got <class 'int'>"):
        mmenvs.register("Mine/Nothing-v0", int)
    half = type("Half", (Task,), {"sample": print, "observe": print, "step": print, "info": print})
    with pytest.raises(TypeError, match="Half'> lacks describe, oracle, render"):
        mmenvs.register("Mine/Nothing-v0", half)
    with pytest.raises(
        ValueError, match="id must end in a version, such as 'Mine/Nothing-v0', got 'Mine/Nothing'"
    ):
        mmenvs.register("Mine/Nothing", task_class("MMRL/VQA-v0"))
    with pytest.raises(TypeError, match="id must be a text such as 'Mine/Task-v0', got 3"):
        mmenvs.register(3, task_class("MMRL/VQA-v0"))
    with pytest.raises(ValueError, match=r"task must be a class or 'module:Class', got 'mine\.Task'"):
        mmenvs.register("Mine/Nothing-v0", "mine.Task")
    with pytest.raises(TypeError, match="tags must be a tuple of texts, got 'abc'"):
        mmenvs.register("Mine/Nothing-v0", task_class("MMRL/VQA-v0"), tags="abc")
    with pytest.raises(ValueError, match="id must be written as 'MMRL/VQA-v0', got 'MMRL/VQA-v00'"):
        mmenvs.register("MMRL/VQA-v00", Coin)
    with pytest.raises(ValueError, match=r"id must have no ':', .*got 'mine:Nothing-v0'"):
        mmenvs.register("mine:Nothing-v0", task_class("MMRL/VQA-v0"))
    for wrong, error, told in (
        ({"kwargs": ["difficulty"]}, TypeError, r"kwargs must be a dict .*got \['difficulty'\]"),
        ({"kwargs": {1: 2}}, TypeError, "kwargs must be a dict"),
        ({"kwargs": {"num_envs": 3}}, ValueError, r"'num_envs' is none, got \{'num_envs': 3\}"),
        ({"kwargs": {"task": "os:path"}}, ValueError, "kwargs must be arguments of the task, 'task' is none"),
        ({"tags": None}, TypeError, "tags must be a tuple of texts, got None"),
        ({"min_score": "0"}, TypeError, "min_score must be a number"),
        ({"max_score": np.inf}, ValueError, "max_score must be"),
        ({"min_score": 2}, ValueError, "min_score must be less than max_score, got 2.0 and 1.0"),
    ):
        with pytest.raises(error, match=told):
            mmenvs.register("Mine/Nothing-v0", task_class("MMRL/VQA-v0"), **wrong)
    assert not {"Mine/Nothing-v0", "Mine/Nothing"} & mmenvs.SPECS.keys()


class Coin(Task):
    """Heads or tails; ``faults`` replace what it declares and gives."""

    faults: dict = {}  # noqa: RUF012

    def __init__(self, num_envs, *, split="train", difficulty=0):
        super().__init__(num_envs, split=split, difficulty=difficulty)
        self.observation_space = gym.spaces.Dict({"seen": gym.spaces.Box(0, 1, (1,))})
        self.action_space, self.info_types = gym.spaces.Discrete(2), {"is_success": bool}
        for name, value in self.faults.items():
            setattr(self, name, value)

    def sample(self, rows):
        pass

    def observe(self, rows, out):
        if "seen" in out:
            out["seen"][rows] = 0.5

    def step(self, rows, actions):
        return (actions == 1).astype(float), np.ones(rows.size, bool)

    def info(self, rows):
        return {"is_success": np.ones(rows.size, bool)}

    def oracle(self, rows):
        return np.ones(rows.size, np.int64)

    describe = render = None


def test_ids_of_others_and_texts_that_name_no_task_are_refused():
    with pytest.raises(ValueError, match=r"'CartPole-v1' is taken by gymnasium\.envs"):
        mmenvs.register("CartPole-v1", Coin)
    for path in ("collections:OrderedDict", "mmenvs.tasks.vqa:Nothing", "math:pi"):
        with pytest.raises(
            TypeError, match=f"task must be the 'module:Class' of a subclass of Task, got '{path}'"
        ):
            MultimodalEnv(path)


def test_a_task_that_is_registered_again_takes_the_place_of_its_former_self(recwarn):
    try:
        mmenvs.register("Mine/Coin-v0", Coin, tags=("old",))
        mmenvs.register("Mine/Coin-v0", Coin, tags=("new",))
        assert mmenvs.SPECS["Mine/Coin-v0"].tags == ("new",)
        assert gym.make("Mine/Coin-v0").reset(seed=0)[0]["seen"] == 0.5
        with pytest.raises(ValueError, match=r"'Mine/Coin-v0' is taken by .*:Coin"):
            mmenvs.register("Mine/Coin-v0", task_class("MMRL/VQA-v0"))
    finally:
        mmenvs.SPECS.pop("Mine/Coin-v0"), gym.registry.pop("Mine/Coin-v0")
    assert not [warning for warning in recwarn if "Overriding" in str(warning.message)]


def test_the_command_line_imports_modules_with_tasks(tmp_path):
    source = (Path(__file__).parents[1] / "examples/custom_task.py").read_text().partition("envs = ")[0]
    own = "Mine/ColourName-v0"
    # One whose right action is always the same, and whose scenes no probe knows.
    source = source.replace('num_envs, *, split="train", difficulty=0):', "num_envs, **more):")
    source = source.replace("(num_envs, split=split, difficulty=difficulty)", "(num_envs, **more)")
    constant = source.replace("(self.colour[rows] == self.word[rows])", "(self.colour[rows] >= 0)")
    # Recipes would look at what is fixed through `shapes`, which knows the world's words only.
    constant = constant.replace("(Task):", "(Task):\n    fixed = frozenset(('image', 'word'))")
    constant = constant.replace("return media.panel", "media.panel").replace("MMRL/ColourName-v0", own)
    (tmp_path / "my_tasks.py").write_text(constant)
    (tmp_path / "broken.py").write_text("import nowhere_to_be_found")
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {**os.environ, "COLUMNS": "200"}}

    def run(module, *words, fails=False):
        words = [*(["--import", module] if module else []), *words]
        done = subprocess.run([sys.executable, "-m", "mmenvs", *words], **options)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stdout + done.stderr

    for module, told in (
        ("my_task", "installed or in this folder, without .py, got 'my_task'"),
        ("a..b", "the name of a module"),
    ):
        assert told in run(module, "list", fails=True)
    assert "nowhere_to_be_found" in run("broken", "list", fails=True)
    assert "next: mmenvs --import my_tasks evaluate agent" in run(
        "my_tasks", "train", own, "--steps", "256", "--device", "cpu", "--out", "agent"
    )
    # What the folder of an agent names is not imported.
    assert f"id '{own}' is not in the suite" in run("", "evaluate", "agent", fails=True)
    assert "oracle" in run("my_tasks", "evaluate", "agent", "--episodes", "16")
    assert "render must give uint8 (H, W, 3), got None" in run(
        "my_tasks", "show", own, "--out", "x.png", fails=True
    )
    grid = ["--embeddings", "cnn+concat", "--seeds", "1", "--episodes", "16", "--device", "cpu"]
    run("my_tasks", "compare", "--envs", own, *grid, "--steps", "256", "--out", "compared")
    report = (tmp_path / "compared/report.md").read_text()
    assert "skipped: its episodes show no scenes" in report and "return lost without image" in report
    assert "skipped: right actions are the same in all episodes" in report


SPACES = gym.spaces
DECLARED_WRONG = [
    (
        {"action_space": SPACES.Box(-1, 1, (2,))},
        TypeError,
        "Coin.action_space must be a Discrete space, got Box",
    ),
    ({"action_space": SPACES.Discrete(2, start=1)}, ValueError, "action_space must begin at 0"),
    ({"observation_space": SPACES.Box(0, 1, (1,))}, TypeError, "observation_space must be a Dict space"),
    ({"observation_space": SPACES.Dict({})}, ValueError, "observation_space must hold one"),
    (
        {"observation_space": SPACES.Dict({"seen": SPACES.Discrete(3)})},
        TypeError,
        r"observation_space\['seen'\] must be a Box space",
    ),
    (
        {"info_types": {"is_success": str}},
        TypeError,
        "info_types must be a dict from names to bool, int or float",
    ),
    (
        {"info_types": {"is_success": float}},
        TypeError,
        r"info_types\['is_success'\] must be bool, got .*float",
    ),
    ({"info_types": {"is_success": [int]}}, TypeError, "info_types must be a dict from names to bool, int"),
    ({"info_types": {"final_obs": int}}, ValueError, "none of episode, final_obs.*got 'final_obs'"),
    ({"info_types": {"_x": int}}, ValueError, "without a leading '_'.*got '_x'"),
    ({"fixed": None}, TypeError, "fixed must be a set of names of observations, got None"),
    ({"history": "seen"}, TypeError, "history must be a set of names of observations, got 'seen'"),
    ({"info_types": {"question_type": int}}, TypeError, r"types must hold the different names .* got \(\)"),
    (
        {"info_types": {"question_type": bool}, "types": ("a",)},
        TypeError,
        "types must hold the different names",
    ),
    ({"info_types": {"question_type": int}, "types": "colour"}, TypeError, "types must hold .*got 'colour'"),
    (
        {"info_types": {"question_type": int}, "types": ("a", "b", "a")},
        TypeError,
        "types must hold the different",
    ),
    ({"info_types": {"question_type": int}, "types": 5}, TypeError, "types must hold .*got 5"),
    ({"streams": [0]}, ValueError, r"must call super.*makes streams a uint64 \(\d,\), got \[0\]"),
    (
        {"streams": np.zeros(7, np.uint64)},
        ValueError,
        r"must call super.*makes streams a uint64 \(\d,\), got uint64 \(7,\)",
    ),
]


def both(rewards, ends):
    return {"step": lambda rows, actions: (rewards(rows), ends(rows))}


def ones(rows):
    return np.ones(rows.size, bool)


def seen_as(value):
    def observe(rows, out):
        for part in out.values():
            part[rows] = value

    return observe


GIVEN_WRONG = [
    (
        both(lambda rows: np.full(rows.size, np.nan), ones),
        ValueError,
        "step .*finite rewards, got nan in row 0",
    ),
    (
        both(lambda rows: np.zeros((rows.size, 1)), ones),
        ValueError,
        r"floats \(\d,\) as rewards, got float64 \(\d, 1",
    ),
    (both(ones, lambda rows: np.ones(rows.size)), ValueError, r"bools \(\d,\) as ends, got float64 \(\d,\)"),
    ({"step": lambda rows, actions: (ones(rows),) * 3}, TypeError, "step must give rewards and ends, got"),
    ({"step": lambda rows, actions: None}, TypeError, "step must give rewards and ends, got None"),
    (
        {"info": lambda rows: {"is_success": [[True], []] * rows.size}},
        ValueError,
        r"as is_success, got object \(\d+,\)",
    ),
    ({"info": lambda rows: None}, TypeError, "info must give a dict, got None"),
    ({"info": lambda rows: {}}, ValueError, "info must give .*which differs in 'is_success'"),
    (
        {"info": lambda rows: {"is_success": ones(rows), 3: ones(rows)}},
        ValueError,
        r"\(is_success\), .* in 3",
    ),
    (
        {"info": lambda rows: {"is_success": ones(rows) * 0.5}},
        ValueError,
        r"bools \(\d,\) as is_success, got float",
    ),
    (
        {"info": lambda rows: {"is_success": ones(rows)[:, None]}},
        ValueError,
        r"as is_success, got bool \(\d, 1",
    ),
    (
        {
            "info_types": {"question_type": int},
            "types": ("a", "b"),
            "info": lambda rows: {"question_type": np.full(rows.size, 2)},
        },
        ValueError,
        "info must give question_type from 0 to 1, got 2",
    ),
    (
        {"observe": seen_as(7)},
        ValueError,
        r"numbers of observation_space\['seen'\].*got 7",
    ),
    (
        {"observe": seen_as(np.nan)},
        ValueError,
        "got nan",
    ),
    (
        {
            "observation_space": SPACES.Dict({"seen": SPACES.Box(0, 1, (1,), np.uint8)}),
            "observe": seen_as(255),
        },
        ValueError,
        r"observation_space\['seen'\].*got 255",
    ),
    (
        {"observe": lambda rows, out: None},
        ValueError,
        r"observe must write all of out\['seen'\]\[rows\]",
    ),
    (
        {"observe": lambda rows, out: out["seen"].__setitem__(rows, 0.5)},
        ValueError,
        "observe must write what out asks for, as in if 'seen' in out",
    ),
    (
        {"observe": lambda rows, out: out.setdefault("seen", np.empty(0)).fill(0.5)},
        ValueError,
        "observe must set no others than none in out",
    ),
    ({"observe": lambda rows, out: {"red": 1}["blue"]}, KeyError, "blue"),
    (
        {"observe": lambda rows, out: out.update(seen=np.zeros(1))},
        ValueError,
        "must write into the arrays of out",
    ),
    (
        {"oracle": lambda rows: np.full(rows.size, 9)},
        ValueError,
        "oracle must give actions from 0 to 1, got 9",
    ),
    ({"oracle": lambda rows: None}, ValueError, r"ints \(\d,\) as actions, got object"),
]


@pytest.mark.parametrize(("faults", "error", "told"), DECLARED_WRONG, ids=lambda x: str(x)[:30])
def test_a_task_that_declares_what_environments_cannot_work_with_is_refused_when_made(faults, error, told):
    task = type("Coin", (Coin,), {"faults": faults})
    for make in (MultimodalEnv, MultimodalVectorEnv):
        with pytest.raises(error, match=told):
            make(task)


@pytest.mark.parametrize(("faults", "error", "told"), GIVEN_WRONG, ids=lambda x: str(x)[:30])
def test_a_task_that_gives_other_than_it_promises_is_named(faults, error, told):
    task = type("Coin", (Coin,), {"faults": faults})
    for env, action, oracle in (
        (MultimodalEnv(task), 1, "oracle_action"),
        (MultimodalVectorEnv(task, 2), np.array([1, 1]), "oracle_actions"),
    ):
        with pytest.raises(error, match=told if error is KeyError else f"Coin.*{told}"):
            env.reset(seed=0)
            getattr(env, oracle)()
            env.step(action)


def test_a_history_that_holds_more_than_the_actions_so_far_is_named():
    class Seen(Coin):
        history = frozenset({"seen"})

        def observe(self, rows, out):
            if "seen" in out:
                out["seen"][rows] = self.streams[rows, None] % 2

    with pytest.raises(ValueError, match=r"Seen\.history must name .* 'seen' differs between episodes"):
        MultimodalVectorEnv(Seen, 16).reset(seed=0)


@pytest.mark.parametrize(
    "picture",
    [None, np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3)), [[[0, 0, 0]]]],
)
def test_a_task_that_draws_no_picture_is_named(picture):
    task = type("Coin", (Coin,), {"render": lambda self, row: picture})
    for env in (
        MultimodalEnv(task, render_mode="rgb_array"),
        MultimodalVectorEnv(task, 2, render_mode="rgb_array"),
    ):
        env.reset(seed=0)
        with pytest.raises(ValueError, match=r"Coin.render must give uint8 \(H, W, 3\), got"):
            env.render()


def test_a_task_that_forgets_its_split_is_refused():
    class Forgetful(Coin):
        def __init__(self, num_envs, *, split="train", difficulty=0):
            super().__init__(num_envs)

    MultimodalEnv(Forgetful, split="train", difficulty=0)
    for make in (MultimodalEnv, MultimodalVectorEnv):
        with pytest.raises(ValueError, match=r"Forgetful.* must hand split='test' on .* has 'train'"):
            make(Forgetful, split="test")
        with pytest.raises(ValueError, match="must hand difficulty=2 on to super"):
            make(Forgetful, difficulty=2)


def test_a_task_may_give_lists_and_views_of_what_it_keeps():
    """Also in steps in which no row acts; and infos that were handed out stay as they are."""

    class Listing(Coin):
        def __init__(self, num_envs):
            super().__init__(num_envs)
            self.won = np.zeros(num_envs, bool)

        def sample(self, rows):
            self.won[rows] = False

        def step(self, rows, actions):
            self.won[rows] = actions == 1
            # Their sum is over what a float holds.
            return [1e308 * (action == 1) for action in actions], np.array(
                [action >= 0 for action in actions]
            )

        def info(self, rows):
            return {"is_success": self.won if rows.size == self.num_envs else self.won[rows]}

    envs = MultimodalVectorEnv(Listing, 2, autoreset_mode="NextStep")
    _, before = envs.reset(seed=0)
    assert envs.step(np.array([1, 1]))[1].tolist() == [1e308, 1e308]
    assert before["is_success"].tolist() == [False, False]
    _, rewards, terminated, _, infos = envs.step(np.array([1, 1]))
    assert not rewards.any() and not terminated.any() and not infos["is_success"].any()
    assert envs.step(np.array([0, 1]))[1].tolist() == [0.0, 1e308]
    with pytest.raises(TypeError, match="task must be a class at the top of a module"):
        mmenvs.register("Mine/Nothing-v0", Listing)
    with pytest.raises(ValueError, match="text must be 'ids' for Listing, which has no vocabulary"):
        MultimodalEnv(Listing, text="string")


def test_arguments_that_no_environment_has_are_named():
    with pytest.raises(TypeError, match=r"'bogus'; it takes .*difficulty.* text, render_mode"):
        gym.make("MMRL/VQA-v0", bogus=1)
    with pytest.raises(TypeError, match=r"'bogus'; it takes .* autoreset_mode, text, render_mode"):
        gym.make_vec("MMRL/VQA-v0", num_envs=2, bogus=1)


def test_dir_lists_what_loads_when_first_used():
    assert set(mmenvs.__all__) <= set(dir(mmenvs))


def test_integrations_load_when_first_used():
    code = "import mmenvs; mmenvs.integrations.sb3.make_vec_env('MMRL/VQA-v0', 2)"
    subprocess.run([sys.executable, "-c", code], check=True)
