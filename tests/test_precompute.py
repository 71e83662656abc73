"""Embedding all that an environment can show: pools and sources, stops, the command, Ray."""

import gc
import resource
import subprocess
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from mmenvs_agents.sb3 import make_agent, save
from typer.testing import CliRunner

from mmenvs import precompute
from mmenvs.cli import app
from mmenvs.datasets import open_source
from mmenvs.embeddings import EmbeddingCache
from mmenvs.env import load_and_check
from mmenvs.files import check_out
from mmenvs.precompute import embed_parts, encode_items, parts_of
from mmenvs.registry import SPECS, task_class
from mmenvs.wrappers import Encoder, VectorEmbedObservation
from tests import photos

VQA, CAPTIONING, MATCHING = "MMRL/VQA-v0", "MMRL/Captioning-v0", "MMRL/AudioVisualMatching-v0"


class Sum(torch.nn.Module):
    """The sum of each row as its only number."""

    def forward(self, x):
        return x.float().flatten(1).sum(1)[:, None, None]


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["embed", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def made(id=VQA, cache=None, **kwargs):
    """A task of 8 rows, and `shapes` for its observations."""
    task = load_and_check(task_class(id), 8, "ids", kwargs)
    return task, Encoder("shapes", task.observation_space, cache=cache or EmbeddingCache())


def embedded(id, cache, **kwargs):
    return VectorEmbedObservation(gym.make_vec(id, num_envs=5, **kwargs), "shapes", cache=cache)


@pytest.fixture
def computed(monkeypatch):
    """Name and number of the rows that are encoded from now on."""
    seen = []

    def forward(self, name, rows, _old=Encoder.forward):
        seen.append((name, len(rows)))
        return _old(self, name, rows)

    monkeypatch.setattr(Encoder, "forward", forward)
    return seen


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven photographs, each with two questions, which are the same of all; one of the seven is a copy."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    questions = [f"what is {word} ?" for word in ("this", "that")]
    root = photos.write(
        tmp_path / "photos", [(i, question, ["one"] * 10) for i in photos.TRAIN[:7] for question in questions]
    )
    one, other = (photos.picture(root, i) for i in photos.TRAIN[:2])
    other.write_bytes(one.read_bytes())
    return root


@pytest.mark.parametrize("id", sorted(SPECS))
def test_an_agent_meets_nothing_new_in_an_embedded_pool(id, computed):
    task, encoder = made(id, pool_size=21)
    assert list(embed_parts(task, encoder, parts_of(task, encoder), size=10))[-1] == 21 * len(task.fixed)
    computed.clear()
    cached = embedded(id, encoder.cache, pool_size=21)
    first = cached.reset(seed=3)[0]
    assert not task.fixed & {name for name, _ in computed}
    np.testing.assert_allclose(first, embedded(id, None, pool_size=21).reset(seed=3)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("id", "name", "distinct"),
    [(VQA, "vqav2", {"image": 6, "question": 2}), (CAPTIONING, "coco", {"image": 6})],
)
def test_each_picture_and_question_of_a_source_is_embedded_once(id, name, distinct, folder, computed):
    source = open_source(f"{name}:{folder}", id)
    task = load_and_check(task_class(id), 3, "ids", {"source": source, "image_size": 32})
    encoder = Encoder(
        {key: Sum() for key in task.observation_space}, task.observation_space, cache=EmbeddingCache()
    )
    parts = parts_of(task, encoder)
    assert {part.name: len(part) for part in parts} == distinct
    assert list(embed_parts(task, encoder, parts))[-1] == sum(distinct.values())
    assert {name: sum(n for key, n in computed if key == name) for name in distinct} == distinct
    computed.clear()
    envs = gym.make_vec(id, num_envs=4, source=source, image_size=32)
    wrapped = VectorEmbedObservation(envs, encoder.embedding, cache=encoder.cache)
    for seed in range(4):
        wrapped.reset(seed=seed)
    assert {key for key, _ in computed} <= {"caption"}


def test_the_line_of_the_readme(tmp_path, monkeypatch, computed):
    monkeypatch.setattr(precompute, "POOL_SIZE", 40)
    said = run(MATCHING, "--embedding", "shapes", "--out", tmp_path / "cache")
    assert "a pool of 40 scenes, as no --pool-size was given" in said
    assert "audio, images of 40 scenes" in said
    computed.clear()
    embedded(MATCHING, EmbeddingCache(tmp_path / "cache"), pool_size=40).reset(seed=0)
    assert not computed


def test_every_argument_of_the_environment(tmp_path, computed):
    common = ("--pool-size", 20, "--split", "val", "--difficulty", 1, "--image-size", 32, "--out", tmp_path)
    run(MATCHING, "--set", "candidates=3", "--set", "seconds=0.5", *common)
    computed.clear()
    arguments = {"split": "val", "difficulty": 1, "image_size": 32, "candidates": 3, "seconds": 0.5}
    embedded(MATCHING, EmbeddingCache(tmp_path), pool_size=20, **arguments).reset(seed=0)
    assert not computed
    assert "image of 20 scenes" in run(CAPTIONING, "--set", "reward=cider", *common)


def test_the_command_embeds_a_data_set(tmp_path, folder, computed):
    source = open_source(f"vqav2:{folder}", VQA)
    agent = make_agent("dqn", VQA, num_envs=2, device="cpu", buffer_size=64, env_kwargs={"source": source})
    save(agent, tmp_path / "agent")
    arguments = (
        VQA,
        "--source",
        f"vqav2:{folder}",
        "--embedding",
        tmp_path / "agent",
        "--out",
        tmp_path / "c",
    )
    assert "6 x image, 2 x question of 14 items" in run(*arguments)
    computed.clear()
    run(*arguments)
    assert not computed
    assert "pool_size must be None with a source" in run(*arguments, "--pool-size", 3, code=2)


def test_a_folder_with_the_name_of_an_embedding_changes_nothing(tmp_path, computed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shapes").mkdir()
    assert "image, question of 5 scenes" in run(VQA, "--pool-size", 5, "--out", tmp_path / "c")


def test_the_same_command_and_a_larger_pool(tmp_path, computed):
    def size(count):
        return float(run(VQA, "--pool-size", count, "--split", "val", "--out", tmp_path).split()[-2])

    whole = size(300)
    computed.clear()
    # The size is of the pool that was asked for, not of all that lies in the folder.
    assert size(300) == whole and size(150) == pytest.approx(whole / 2, abs=0.1) and not computed
    size(320)
    assert computed == [("image", 20), ("question", 20)]


def test_the_command_goes_on_after_ctrl_c(tmp_path, monkeypatch):
    computed = []

    def forward(self, name, rows, _old=Encoder.forward):
        if len(computed) == 3:
            computed.append(0)
            raise KeyboardInterrupt
        computed.append(len(rows))
        return _old(self, name, rows)

    monkeypatch.setattr(Encoder, "forward", forward)
    assert "goes on" in run(VQA, "--pool-size", 600, "--out", tmp_path, code=130)
    run(VQA, "--pool-size", 600, "--out", tmp_path)
    assert sum(computed) == 1200


def test_the_command_goes_on_after_kill_9(tmp_path, computed):
    script = f"""
import os, signal
from mmenvs.cli import app
from mmenvs.wrappers import Encoder
calls, old = [], Encoder.forward

def forward(self, name, rows):
    calls.append(name)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return old(self, name, rows)

Encoder.forward = forward
app(["embed", "{VQA}", "--pool-size", "600", "--out", {str(tmp_path)!r}])
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == -9
    run(VQA, "--pool-size", 600, "--out", tmp_path)
    # Two of its slices of 256 were there.
    assert sum(n for _, n in computed) == 1200 - 512


def test_a_disk_that_is_full_is_an_error(tmp_path, computed):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.warns(UserWarning, match="nothing more is written"):
            said = run(VQA, "--pool-size", 600, "--out", tmp_path, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "is full; what is in it stays" in said
    kept = (200_000 - 64) // 536  # as many as the file may hold
    run(VQA, "--pool-size", 600, "--out", tmp_path)
    assert sum(n for _, n in computed) == 1200 + 512 - kept


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["MMRL/VQ-v0"], "did you mean MMRL/VQA-v0"),
        ([VQA, "--pool-size", "0"], "pool_size must be from 1"),
        ([VQA, "--embedding", "clop"], "embedding must be 'shapes', 'joint:DIR' or the folder of"),
        ([VQA, "--embedding", "clop"], "there is no folder 'clop'"),
        ([VQA, "--image-size", "33"], "image_size must be even"),
        ([VQA, "--output", "mean"], "output must be one of"),
        ([VQA, "--pool-size", "10000000"], "budget_mb=2048 is too small"),
        ([VQA, "--set", "candidates=3"], "VQA: VQA.__init__() got an unexpected keyword argument 'candidates'; it takes split, "),
        ([MATCHING, "--set", "candidates=9"], "candidates must be from 2 to 8, got 9"),
        ([MATCHING, "--set", "candidates"], "--set must be NAME=VALUE"),
        ([MATCHING, "--set", "split=val"], "split is given twice, or has an option of its own"),
        ([VQA, "--engine", "spark"], "engine must be one of 'local', 'ray'"),
        ([VQA, "--address", "auto"], "address is for engine='ray'"),
        ([VQA, "--source", "coco:x"], "source 'coco' is for MMRL/Captioning-v0"),
    ],
)  # fmt: skip
def test_the_command_names_what_is_wrong(arguments, says, tmp_path):
    assert says in run(*arguments, "--out", tmp_path, code=2)


def test_a_cache_is_not_mixed_with_other_results(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    assert "holds a comparison" in run(VQA, "--pool-size", 3, "--out", tmp_path, code=2)
    run(VQA, "--pool-size", 3, "--out", tmp_path / "cache")
    with pytest.raises(ValueError, match=r"holds a cache \(lock\): choose another folder"):
        check_out(tmp_path / "cache", "comparison")


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("")
    assert "out must be a folder" in run(VQA, "--pool-size", 3, "--out", tmp_path / "a", code=2)


def test_checks_run_before_the_work():
    with pytest.raises(ValueError, match="a task with pool_size or a source, and an encoder with a cache"):
        parts_of(*made())
    task, encoder = made(pool_size=10**6, cache=EmbeddingCache(budget_mb=100))
    with pytest.raises(
        ValueError, match="budget_mb=100 is too small for what there is to embed, which takes 10"
    ):
        parts_of(task, encoder)
    task.fixed = frozenset()
    with pytest.raises(ValueError, match="no observation of VQA is fixed in an episode"):
        parts_of(task, encoder)


def test_items_that_another_machine_sees_otherwise_are_refused():
    task, encoder = made(pool_size=9)
    image = parts_of(task, encoder)[0]
    assert encode_items(task, encoder, image, check=True).shape == (9, 128)
    other, _ = made(pool_size=9, difficulty=1)
    with pytest.raises(ValueError, match="the same items show another image here"):
        encode_items(other, encoder, image, check=True)


of_ray = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def cluster():
    """Ray on one processor."""
    ray = pytest.importorskip("ray", reason="Ray, of the extra ray, is not installed")
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield ray
    with warnings.catch_warnings():
        # Ray leaves files and processes to the garbage collector, which would tell of them in any later test.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()


@of_ray
def test_ray_embeds_the_same(cluster, tmp_path, computed):
    from mmenvs.integrations.ray import on_ray

    task, encoder = made(pool_size=40)
    assert list(embed_parts(task, encoder, parts_of(task, encoder), on_ray, size=15))[-1] == 80
    assert not computed  # all of it was done elsewhere
    cached = embedded(VQA, encoder.cache, pool_size=40).reset(seed=1)[0]
    assert not computed
    np.testing.assert_allclose(cached, embedded(VQA, None, pool_size=40).reset(seed=1)[0], atol=1e-5)
    assert "image, question of 30 scenes" in run(VQA, "--pool-size", 30, "--engine", "ray", "--out", tmp_path)


@of_ray
def test_a_worker_of_ray_that_sees_something_else_is_named(cluster):
    from mmenvs.integrations.ray import on_ray

    task, encoder = made(pool_size=9)
    parts = parts_of(task, encoder)
    other, _ = made(pool_size=9, split="val")
    with pytest.raises(ValueError, match=r"on machine '.*': the same items show another image here"):
        list(embed_parts(other, encoder, parts, on_ray))
    encoder.embedding.fingerprints["image"] = "0" * 32
    with pytest.raises(ValueError, match="the code of the embedding is another one"):
        list(embed_parts(task, encoder, parts, on_ray))
