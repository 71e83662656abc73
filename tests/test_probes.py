"""Probes have known answers on made-up embeddings, symbols and paired scenes agree with the world, costs add up."""

import json
from itertools import permutations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import mmenvs  # noqa: F401
from mmenvs.embeddings import probes
from mmenvs.embeddings.cost import cost
from mmenvs.embeddings.probes import (
    alignment,
    cka,
    effective_rank,
    knn_probe,
    linear_probe,
    modality_gap,
    modality_use,
    probe_report,
    retrieval,
    symbols_of,
    uniformity,
)
from mmenvs.spaces import SAMPLE_RATE
from mmenvs.tasks.audio_visual import AudioVisualMatching
from mmenvs.tasks.captioning import Captioning
from mmenvs.tasks.vqa import VQA
from mmenvs.world import captions, scene, sound
from mmenvs.world.pairs import PairedScenes
from mmenvs.world.scene import ATTRIBUTES, DIFFICULTIES, SPLITS

every_level = pytest.mark.parametrize("difficulty", range(4))
MATCHING = "MMRL/AudioVisualMatching-v0"


def normal(n, d, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def rotation(d, seed=1):
    return np.linalg.qr(normal(d, d, seed))[0]


# ---------------------------------------------------------------------------------------------------------
# Measures on made-up embeddings
# ---------------------------------------------------------------------------------------------------------


def test_perfect_embeddings():
    a = normal(512, 16)
    b = 3.0 * a
    found = retrieval(a, b)
    assert found["queries"] == 512 and found["pool"] == 256
    assert found["a_to_b"] == found["b_to_a"] == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0}
    assert alignment(a, b) == pytest.approx(0, abs=1e-12)
    assert modality_gap(a, b) == pytest.approx(0, abs=1e-12)
    assert cka(a, b) == pytest.approx(1)


def test_unrelated_embeddings():
    a, b = normal(2048, 64), normal(2048, 64, 1)
    found = retrieval(a, b)
    for way in ("a_to_b", "b_to_a"):
        for k in (1, 5, 10):
            p = k / 256
            assert abs(found[way][f"recall@{k}"] - p) < 5 * np.sqrt(p * (1 - p) / 2048)
    assert alignment(a, b) == pytest.approx(2, abs=0.02)
    assert uniformity(a) == pytest.approx(-4, abs=0.2)
    assert modality_gap(a, b) < 0.05
    assert abs(cka(a[:500], normal(500, 2000, 2))) < 0.02


def test_collapsed_embeddings():
    a = np.ones((512, 7)) * normal(1, 7)
    found = retrieval(a, normal(512, 7))
    assert found["a_to_b"]["recall@5"] == found["b_to_a"]["recall@5"] == pytest.approx(5 / 256)
    assert uniformity(a) == pytest.approx(0, abs=1e-12)
    assert effective_rank(a) == cka(a, normal(512, 7)) == cka(normal(512, 7), a.astype(np.float32)) == 0.0
    assert modality_gap(a, -a) == pytest.approx(2)
    assert alignment(a, -a) == pytest.approx(4)


def test_dead_embeddings_are_finite():
    a = np.zeros((256, 3))
    assert retrieval(a, a)["a_to_b"]["recall@1"] == pytest.approx(1 / 256)
    assert (alignment(a, a), uniformity(a), modality_gap(a, a), effective_rank(a), cka(a, a)) == (0,) * 5


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), d=st.integers(2, 12), scale=st.floats(0.1, 10))
def test_measures_are_invariant_where_they_should_be(seed, d, scale):
    a, b = normal(64, d, seed), normal(64, d, seed + 1) + 0.3
    q, p = rotation(d, seed + 2), rotation(d, seed + 3)
    same = pytest.approx
    lengths = np.exp(normal(64, 1, seed + 4))
    assert retrieval(a * lengths @ q, scale * b @ q, pool=32) == retrieval(a, b, pool=32)
    assert alignment(a * lengths @ q, b @ q) == same(alignment(a, b))
    assert uniformity(a * lengths @ q) == same(uniformity(a))
    assert modality_gap(scale * a @ q, b * lengths @ q) == same(modality_gap(a, b))
    assert cka(scale * a @ q + 5, b @ p - 1) == same(cka(a, b))
    assert effective_rank(scale * a @ q + 5) == same(effective_rank(a))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_retrieval_is_the_mean_over_all_orders_of_ties(data):
    """Against every order of 4 candidates: ties and groups included."""
    row = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    rows = st.lists(row, min_size=4, max_size=4)
    a, b = np.array(data.draw(rows)), np.array(data.draw(rows))
    groups = np.array(data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)))

    def unit(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)

    similarity = (unit(a) @ unit(b).T).round(9)
    for way, table in (("a_to_b", similarity), ("b_to_a", similarity.T)):
        found = retrieval(a, b, ks=(1, 2, 4), pool=4, groups=groups)[way]
        for k in (1, 2, 4):
            hits = [
                any(groups[c] == groups[i] for c in sorted(order, key=lambda c, i=i: -table[i, c])[:k])
                for i in range(4)
                for order in permutations(range(4))
            ]
            assert found[f"recall@{k}"] == pytest.approx(np.mean(hits))


def test_duplicates_count_as_right_by_their_group():
    a = np.repeat(normal(128, 8), 2, 0)
    alone = retrieval(a, a)["a_to_b"]
    assert alone["recall@1"] == pytest.approx(0.5) and alone["recall@5"] == 1.0
    assert retrieval(a, a, groups=np.repeat(np.arange(128), 2))["a_to_b"]["recall@1"] == 1.0


def test_uniformity_and_cka_equal_their_definitions():
    a, b = normal(6, 3), normal(6, 2, 1)
    u = a / np.linalg.norm(a, axis=1, keepdims=True)
    each = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(6) for j in range(i)]
    assert uniformity(a) == pytest.approx(np.log(np.mean(each)))

    def hsic(k, l):  # noqa: E741
        """Song et al. 2012, equation 5."""
        k, l, n = k - np.diag(np.diag(k)), l - np.diag(np.diag(l)), 6  # noqa: E741
        total = np.trace(k @ l) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ l).sum()
        return total / (n * (n - 3))

    k, l = a @ a.T, b @ b.T  # noqa: E741
    assert cka(a, b) == pytest.approx(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))


@pytest.mark.parametrize("d", [1, 2, 5])
def test_effective_rank_counts_directions(d):
    axes = np.eye(8)[:d]
    assert effective_rank(np.concatenate([axes, -axes]) @ rotation(8) + 3) == pytest.approx(d)


def test_probes_read_what_is_there_and_nothing_else():
    x, other = normal(600, 10), normal(400, 10, 1)
    w = normal(10, 3, 2)
    ids, test_ids = (x @ w).argmax(1), (other @ w).argmax(1)
    assert linear_probe(x, ids, other, test_ids) > 0.95
    assert linear_probe(x, x @ w > 0, other, other @ w > 0) > 0.95
    assert linear_probe(100 * x + 7, ids, 100 * other + 7, test_ids) > 0.95
    noise = np.random.default_rng(3).integers(0, 2, 400)
    for probe in (linear_probe, knn_probe):
        assert abs(probe(x, np.arange(600) % 2, other, noise) - 0.5) < 0.13
    dead = np.zeros((600, 10))
    assert linear_probe(dead, ids, dead[:400], test_ids) == np.mean(test_ids == np.bincount(ids).argmax())


def test_knn_reads_clusters():
    centres = normal(5, 20)
    ids = np.arange(500) % 5
    x = centres[ids] + 0.1 * normal(500, 20, 1)
    assert knn_probe(x[:300], ids[:300], 2 * x[300:] @ np.eye(20), ids[300:]) == 1.0
    assert (
        knn_probe(x[:300], np.eye(5, dtype=bool)[ids[:300]], x[300:], np.eye(5, dtype=bool)[ids[300:]]) == 1.0
    )
    # Opposite clusters of one class: neighbours tell it, no line does.
    x, ids = x * (-1.0) ** (np.arange(500) // 5)[:, None], ids > 1
    assert knn_probe(x[:300], ids[:300, None], x[300:], ids[300:, None]) == 1.0
    assert linear_probe(x[:300], ids[:300, None], x[300:], ids[300:, None]) < 0.75


good = normal(8, 3)
labels = np.arange(8) % 2


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: uniformity(good[0]), ValueError, r"a must have shape \(n, d\) with n >= 2"),
        (lambda: uniformity(good[:1]), ValueError, "n >= 2"),
        (lambda: effective_rank(np.full((4, 2), np.nan)), ValueError, "a must be finite, row 0 is not"),
        (lambda: cka(good[:3], good[:3]), ValueError, "n >= 4"),
        (lambda: cka(good, good[:7]), ValueError, "8 and 7 rows"),
        (lambda: alignment(good, good[:, :2]), ValueError, "of one width, got 3 and 2"),
        (lambda: modality_gap(good, np.where(good > 9, good, np.inf)), ValueError, "b must be finite"),
        (lambda: effective_rank(np.array([["x"]])), TypeError, "array of numbers"),
        (lambda: retrieval(good, good), ValueError, "pool must be from 2 to 8, got 256"),
        (lambda: retrieval(good, good, ks=(9,), pool=8), ValueError, "ks must be from 1 to 8, got 9"),
        (
            lambda: retrieval(good, good, (1,), 8, groups=labels[:3]),
            ValueError,
            r"groups must have shape \(8,\)",
        ),
        (lambda: linear_probe(good, labels[:5], good, labels), ValueError, "train_y must be class ids"),
        (lambda: linear_probe(good, labels, good, labels - 1), ValueError, "test_y"),
        (lambda: linear_probe(good, labels * 1.0, good, labels), ValueError, "train_y"),
        (lambda: linear_probe(good, good > 0, good, good[:, :2] > 0), ValueError, "must be alike"),
        (lambda: knn_probe(good, labels, good[:, :2], labels), ValueError, "one width"),
        (lambda: knn_probe(good, labels, good, labels, k=9), ValueError, "k must be from 1 to 8"),
    ],
)
def test_wrong_arrays_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---------------------------------------------------------------------------------------------------------
# Paired scenes
# ---------------------------------------------------------------------------------------------------------


@every_level
@pytest.mark.parametrize("split", SPLITS)
def test_pairs_show_tell_and_play_one_scene(difficulty, split):
    n = 24
    pairs = PairedScenes(n, difficulty=difficulty, split=split, seed=5)
    pairs.next()
    batch = pairs.next()
    assert pairs.drawn == 2 * n
    level = DIFFICULTIES[difficulty]
    for name, space in pairs.observation_space.items():
        assert all(space.contains(x) for x in batch[name])

    # The picture and the caption are those of the captioning task for the same (split, seed, episode).
    task = Captioning(n, difficulty=difficulty, split=split)
    rows = np.arange(n)
    task.start(rows, np.full(n, 5, np.uint64), rows + n)
    image = np.zeros((n, 64, 64, 3), np.uint8)
    task.observe(rows, {"image": image})
    assert (image == batch["image"]).all()
    assert (captions.score(batch["caption"], task.scenes, level.textures)[:, captions.F1] == 1).all()

    slot = sound.samples_of(1.0) // level.objects_max
    for i in rows:
        told = captions.parse(batch["caption"][i]).phrases
        shown = scene.words(task.scenes, i)
        assert scene.in_split(task.scenes, i, SPLITS.index(split))
        assert len(told) == batch["count"][i] == len(shown)
        for k, (phrase, words) in enumerate(zip(told, shown, strict=True)):
            if level.textures == 1:
                assert phrase.texture is None
                words = {**words, "texture": None}
            assert phrase._asdict() == words
            # The strongest frequency of the object's part of the sound is its colour's pitch.
            spectrum = np.abs(np.fft.rfft(batch["audio"][i, k * slot : (k + 1) * slot], 1 << 15))
            heard = spectrum.argmax() * SAMPLE_RATE / (1 << 15)
            nearest = int(np.abs(np.log(sound.PITCH / max(heard, 1.0))).argmin())
            assert scene.COLOURS[nearest] == phrase.colour
    assert (batch["attributes"] == pairs.scenes.attributes).all()


def test_pairs_depend_on_the_stream_alone():
    few, many = (PairedScenes(n, difficulty=2, split="val", seed=9) for n in (4, 12))
    whole = {name: x.copy() for name, x in many.next().items()}
    for first in (0, 4, 8):
        assert all(
            (x == whole[name][first : first + 4]).all()
            for name, x in few.next().items()
            if name != "attributes"
        )
    few.drawn = 4
    assert (few.next()["image"] == whole["image"][4:8]).all()
    other = PairedScenes(12, difficulty=2, split="val", seed=10).next()
    assert not np.isin(other["content"], whole["content"]).any()


@pytest.mark.parametrize("difficulty", range(4))
def test_a_twin_differs_in_one_attribute_of_one_object(difficulty):
    batch = PairedScenes(200, difficulty=difficulty, split="train", twins=True).next()
    first, second = (batch["attributes"][half].astype(int) for half in (slice(100), slice(100, 200)))
    assert (batch["count"][:100] == batch["count"][100:]).all()
    there = np.arange(first.shape[1]) < batch["count"][:100, None]
    differences = ((first != second) & there[:, :, None]).sum((1, 2))
    assert (differences == 1).all()
    kinds = {int(a) for a in np.nonzero(((first != second) & there[:, :, None]).any(1))[1]}
    assert kinds == ({0, 1, 2} if difficulty == 0 else {0, 1, 2, 3})


def test_ids_of_pairs_are_equal_where_content_is():
    batch = PairedScenes(600, difficulty=0, split="train").next()
    pairs = PairedScenes(600, difficulty=0, split="train")
    pairs.next()
    told = [tuple(row) for row in batch["caption"].tolist()]
    cells = [tuple(row[:n].tolist()) for row, n in zip(pairs.scenes.cell, batch["count"], strict=True)]
    objects, content = batch["objects"].tolist(), batch["content"].tolist()
    assert len(set(objects)) == len(set(told)) == len(set(zip(objects, told, strict=True))) < 600
    there = list(zip(told, cells, strict=True))
    assert len(set(content)) == len(set(there)) == len(set(zip(content, there, strict=True)))
    assert len(set(content)) > len(set(objects))
    # Without noise, equal objects sound the same.
    first = {}
    for i, key in enumerate(objects):
        assert (batch["audio"][first.setdefault(key, i)] == batch["audio"][i]).all()


def test_films_show_the_same_objects_at_other_places_of_their_cells():
    pairs = PairedScenes(6, difficulty=0, split="train", frames=3)
    batch = pairs.next()
    assert pairs.observation_space["film"].contains(batch["film"][0])
    assert (batch["film"][:, 0] != batch["film"][:, 1]).any((1, 2, 3)).all()
    # Difficulty 0 has no nuisance but jitter: each quarter of the picture is lit alike in all frames.
    quarters = batch["film"].astype(int).reshape(6, 3, 2, 32, 2, 32, 3).sum((3, 5))
    still = batch["image"].astype(int).reshape(6, 2, 32, 2, 32, 3).sum((2, 4))
    assert (abs(quarters - still[:, None]) <= 0.01 * still[:, None]).all()
    without = PairedScenes(6, difficulty=0, split="train").next()
    assert all((batch[name] == x).all() for name, x in without.items())


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        ({"num": 0}, ValueError, "num"),
        ({"difficulty": 4}, ValueError, "difficulty must be from 0 to 3"),
        ({"split": "all"}, ValueError, "split must be one of"),
        ({"image_size": 33}, ValueError, "image_size must be even"),
        ({"seconds": 3}, ValueError, "seconds must be from 0.5 to 2"),
        ({"frames": -1}, ValueError, "frames"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_wrong_arguments_of_pairs_are_named(kwargs, error, words):
    with pytest.raises(error, match=words):
        PairedScenes(**{"num": 2, "difficulty": 0, "split": "train", **kwargs})


# ---------------------------------------------------------------------------------------------------------
# Symbols and the report
# ---------------------------------------------------------------------------------------------------------


@every_level
@pytest.mark.parametrize("cls", [VQA, Captioning, AudioVisualMatching])
def test_symbols_are_the_scenes(cls, difficulty):
    task = cls(30, difficulty=difficulty)
    rows = np.arange(30)
    task.start(rows, np.zeros(30, np.uint64), rows)
    chosen = np.array([3, 29, 0])
    symbols = symbols_of(task, chosen)
    for j, row in enumerate(chosen):
        i = row * task.candidates + task.target[row] if cls is AudioVisualMatching else row
        objects = scene.words(task.scenes, i)
        assert symbols["count"][j] == len(objects)
        for name, values in zip(ATTRIBUTES, captions._NAMES, strict=True):
            there = {values[v] for v in np.flatnonzero(symbols[name][j])}
            assert there == {x[name] for x in objects}
            assert values[symbols[f"first_{name}"][j]] == objects[0][name]


class Told:
    """Encodes every observation as the words of the caption, one after the other: a perfect embedding."""

    def encode(self, observation):
        words = F.one_hot(observation["caption"], 97).flatten(1).float()
        return {name: torch.stack([words, words], 1) for name in observation}


def test_report_of_a_perfect_embedding():
    report = probe_report(Told(), probes.PAIRS, n=512, difficulty=0)
    assert json.loads(json.dumps(report)) == report
    assert set(report["modalities"]) == {"image", "caption", "audio"}
    for modality in report["modalities"].values():
        assert modality["tokens"] == 2 and modality["width"] == 11 * 97
        asked = modality["probes"]
        assert asked["texture"] == asked["first_texture"] == {"skipped": "it is the same in all rows"}
        for name in ("shape", "colour", "size", "count"):
            assert asked[name]["linear"] > 0.97 > asked[name]["majority"]
    assert len(report["pairs"]) == 3
    for pair in report["pairs"].values():
        assert pair["cka"] == pytest.approx(1) and pair["alignment"] == pytest.approx(0, abs=1e-9)
        assert pair["retrieval"]["a_to_b"]["recall@1"] == pair["retrieval"]["b_to_a"]["recall@1"] == 1.0


class Flat:
    """Encodes pictures by their colours and words by their number: of different widths."""

    def encode(self, observation):
        encoded = {}
        for name, x in observation.items():
            mean = x.float().mean((-3, -2)) if x.dim() >= 4 else x[:, ::7].float()
            encoded[name] = mean if mean.dim() == 3 else mean[:, None]
        return encoded


def test_report_skips_what_cannot_be_measured():
    report = probe_report(Flat(), MATCHING, n=256, env_kwargs={"candidates": 3})
    assert report["modalities"]["images"]["tokens"] == 1 and report["modalities"]["images"]["width"] == 3
    why = report["pairs"]["audio-images"]["retrieval"]["skipped"]
    assert why == "audio has width 2286 and images has width 3"


def test_the_heard_picture_is_probed():
    batch = next(probes._batches(MATCHING, 0, {"split": "val", "difficulty": 1}))
    tokens = torch.arange(4.0).repeat_interleave(2)[None, :, None].expand(256, 8, 5)
    pooled, count = probes._pooled("images", tokens, batch)
    assert count == 2 and (pooled == batch.heard[:, None]).all() and len(set(batch.heard)) == 4
    assert (probes._pooled("audio", tokens, batch)[0] == 1.5).all()


def test_growing_texts_are_whole():
    batch = next(probes._batches("MMRL/Captioning-v0", 0, {"split": "val", "difficulty": 1}))
    first = [captions.parse(row[1:]).phrases[0].shape for row in batch.observation["caption"]]
    assert first == [scene.SHAPES[s] for s in batch.symbols["first_shape"]]
    assert batch.texts == ("caption",)


class Gives:
    def __init__(self, result):
        self.result = result

    def encode(self, observation):
        return self.result


@pytest.mark.parametrize(
    "embedding, kwargs, error, words",
    [
        (
            Gives({"image": torch.full((256, 1, 3), torch.nan)}),
            {},
            ValueError,
            "encoding of 'image' must be finite",
        ),
        (Gives({"image": torch.zeros(256, 3)}), {}, ValueError, r"\(256, T, d\), got \(256, 3\)"),
        (Gives(({}, {})), {}, TypeError, "load_embedding"),
        (object(), {}, TypeError, "encode method"),
        (Told(), {"n": 100}, ValueError, "n must be from 256"),
        (Told(), {"split": "x"}, ValueError, "split must be one of"),
        (Told(), {"difficulty": 7}, ValueError, "difficulty"),
        (Told(), {"id": "MMRL/VQ-v0"}, gym.error.NameNotFound, "did you mean"),
    ],
)
def test_wrong_arguments_of_the_report_are_named(embedding, kwargs, error, words):
    with pytest.raises(error, match=words):
        probe_report(embedding, **{"id": probes.PAIRS, "n": 256, **kwargs})


# ---------------------------------------------------------------------------------------------------------
# Modality use
# ---------------------------------------------------------------------------------------------------------


def answers_of(id, key, seeds, act, **kwargs):
    """What the oracle does first, by the bytes of one observation."""
    envs = gym.make_vec(id, num_envs=seeds, **kwargs)
    observation, _ = envs.reset(seed=0)
    return {x.tobytes(): act(envs, row) for row, x in enumerate(observation[key])}


def test_an_agent_that_only_listens():
    table = answers_of(
        MATCHING, "audio", 300, lambda envs, row: int(envs.oracle_actions()[row]), difficulty=2
    )

    def predict(observation, missing=()):
        if "audio" in missing:
            assert not observation["audio"].any()
            return np.zeros(len(observation["audio"]), np.int64)
        return np.array([table[x.tobytes()] for x in observation["audio"]])

    used = modality_use(predict, MATCHING, env_kwargs={"difficulty": 2}, episodes=300, num_envs=150)
    assert used["images"] == {"score": 1.0, "dropped": 0.0, "shuffled": 0.0, "swapped": 0.0}
    assert used["audio"]["swapped"] == used["audio"]["score"] == 1.0
    assert used["audio"]["dropped"] == pytest.approx(0.75, abs=0.13)
    assert used["audio"]["shuffled"] == pytest.approx(0.75, abs=0.13)
    assert modality_use(predict, MATCHING, env_kwargs={"difficulty": 2}, episodes=300, num_envs=150) == used


def test_an_agent_that_only_reads():
    def predict(observation):
        return observation["question"].sum(1) % 34, None

    used = modality_use(predict, "MMRL/VQA-v0", episodes=100, num_envs=64)
    assert used["image"] == {
        "score": used["image"]["score"],
        "dropped": None,
        "shuffled": 0.0,
        "swapped": 0.0,
    }


def test_an_agent_of_many_steps_that_only_looks():
    id = "MMRL/Captioning-v0"
    told = answers_of(id, "image", 40, lambda envs, row: envs.task._canonical(np.array([row]))[0])

    def predict(observation):
        at = (observation["caption"] != 0).sum(1) - 1
        captions_ = [told[x.tobytes()] for x in observation["image"]]
        return np.array([said[min(k, len(said) - 1)] for said, k in zip(captions_, at, strict=True)])

    used = modality_use(predict, id, episodes=40)
    assert used["image"]["score"] == 1.0 and used["image"]["dropped"] is None
    assert used["image"]["swapped"] >= used["image"]["shuffled"] > 0.3


@pytest.mark.parametrize(
    "predict, kwargs, error, words",
    [
        ("agent", {}, TypeError, "predict must be callable"),
        (lambda observation: np.zeros(3, np.int64), {}, ValueError, "must return 8 integers"),
        (lambda observation: np.zeros(8), {}, ValueError, "must return 8 integers, got float64"),
        (lambda observation: np.full(8, 99), {}, ValueError, "actions from 0 to 33, got 99 to 99"),
        (lambda observation: np.zeros(8, np.int64), {"episodes": 1}, ValueError, "episodes"),
        (lambda observation: np.zeros(2, np.int64), {"num_envs": 1}, ValueError, "num_envs"),
        (lambda observation: np.zeros(8, np.int64), {"env_kwargs": {"size": 1}}, TypeError, "size"),
    ],
)
def test_wrong_arguments_of_modality_use_are_named(predict, kwargs, error, words):
    with pytest.raises(error, match=words):
        modality_use(predict, "MMRL/VQA-v0", **{"episodes": 8, **kwargs})


# ---------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(100, 1000), nn.Linear(1000, 10)
        self.a.requires_grad_(False)

    def forward(self, observation):
        return self.b(self.a(observation["x"]))


SPACE = spaces.Dict({"x": spaces.Box(-np.inf, np.inf, (100,), np.float32)})


def test_cost_adds_up():
    net = Net().train()
    measured = cost(net, SPACE, batch_sizes=(32, 8))
    weights = 100 * 1000 + 1000 + 1000 * 10 + 10
    assert measured["parameters"] == weights and measured["weight_bytes"] == 4 * weights
    assert measured["trainable_parameters"] == 10_010
    assert measured["flops"] == 2 * (100 * 1000 + 1000 * 10)
    assert measured["row_bytes"] == 40 and measured["device"] == "cpu"
    assert list(measured["throughput"]) == [1, 8, 32]
    assert measured["best_throughput"] == measured["throughput"][measured["best_batch_size"]]
    assert measured["latency_ms"] == pytest.approx(1000 / measured["throughput"][1])
    # All of it is alive at the end: the hidden layer isn't freed before the result is there.
    assert measured["peak_memory_bytes"] == 4 * (weights + 32 * (100 + 1000 + 10))
    assert net.training


class Mixes(nn.Module):
    def forward(self, observation):
        x = observation["x"].view(-1, 2, 10, 5)
        return F.scaled_dot_product_attention(x, x, x)


def test_attention_counts():
    assert cost(Mixes(), SPACE, batch_sizes=(1,))["flops"] == 2 * 2 * (2 * 10 * 10 * 5)


@pytest.mark.parametrize(
    "args, kwargs, error, words",
    [
        ((lambda x: x, SPACE), {}, TypeError, "module must be a torch module"),
        ((Net(), SPACE["x"]), {}, TypeError, "observation_space must be a Dict"),
        ((Net(), SPACE), {"batch_sizes": ()}, ValueError, "batch_sizes"),
        ((Net(), SPACE), {"batch_sizes": (0,)}, ValueError, "batch_sizes must be from 1"),
        ((Net(), SPACE), {"device": "tpu"}, ValueError, "device must be"),
        pytest.param(
            (Net(), SPACE),
            {"device": "cuda"},
            ValueError,
            "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)
def test_wrong_arguments_of_cost_are_named(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        cost(*args, **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cost_on_cuda():
    measured = cost(Net(), SPACE, device="cuda", batch_sizes=(64,))
    assert measured["flops"] == 2 * (100 * 1000 + 1000 * 10)
    assert measured["peak_memory_bytes"] >= 4 * (111_010 + 64 * 1110)
