"""Scenes: limits of each level, splits by content, streams."""

import numpy as np
import pytest
from numba import njit

from mmenvs.world import random, scene

N = 2000


def sampled(difficulty, split, seed=0, n=N):
    scenes, streams, rows = scene.empty(n), np.zeros(n, np.uint64), np.arange(n)
    split_id = scene.SPLITS.index(split)
    random.start(streams, rows, split_id, rows.astype(np.uint64) + np.uint64(seed), np.zeros(n, np.int64))
    scene.sample_rows(scenes, rows, streams, scene.DIFFICULTIES[difficulty], split_id)
    return scenes


def contents(scenes):
    """What stands where, spelt out rather than hashed."""
    return {
        tuple((int(scenes.cell[i, k]), *map(int, scenes.attributes[i, k])) for k in range(scenes.count[i]))
        for i in range(scenes.count.size)
    }


def pairs(scenes):
    return {
        (int(scenes.attributes[i, k, 0]), int(scenes.attributes[i, k, 1]))
        for i in range(scenes.count.size)
        for k in range(scenes.count[i])
    }


@pytest.mark.parametrize("difficulty", range(4))
@pytest.mark.parametrize("split", scene.SPLITS)
def test_scenes_keep_to_their_level(difficulty, split):
    level, scenes = scene.DIFFICULTIES[difficulty], sampled(difficulty, split)
    assert scenes.count.min() == level.objects_min and scenes.count.max() == level.objects_max
    for i in range(300):
        n = scenes.count[i]
        attributes = scenes.attributes[i, :n]
        assert (attributes < (level.shapes, 8, 2, level.textures)).all()
        assert (np.diff(scenes.cell[i, :n].astype(int)) > 0).all()
        radius = np.array(scene.DIAMETER)[attributes[:, 2]] / level.grid / 2
        centres = np.stack([scenes.x[i, :n], scenes.y[i, :n]], 1)
        assert (centres - radius[:, None] > 0).all() and (centres + radius[:, None] < 1).all()
        apart = np.abs(centres[:, None] - centres[None]).max(-1) - radius[:, None] - radius[None]
        assert (apart[~np.eye(n, dtype=bool)] > 0).all(), "objects overlap"
        assert np.abs(scenes.angle[i, :n]).max() <= level.rotation


@pytest.mark.parametrize("difficulty", range(4))
def test_splits_share_no_content(difficulty):
    found = [contents(sampled(difficulty, split, n=20_000)) for split in scene.SPLITS]
    for a in range(4):
        for b in range(a):
            assert not found[a] & found[b]


@pytest.mark.parametrize("difficulty", range(4))
def test_compositional_pairs_never_leak(difficulty):
    held = {(s, c) for s in range(8) for c in range(8) if scene.held_out.py_func(s, c)}
    assert len(held) == 8
    for split in ("train", "val", "test"):
        seen = pairs(sampled(difficulty, split, n=20_000))
        assert seen == {(s, c) for s in range(scene.DIFFICULTIES[difficulty].shapes) for c in range(8)} - held
    scenes = sampled(difficulty, "compositional", n=20_000)
    assert pairs(scenes) >= held
    for i in range(2000):
        assert any((int(s), int(c)) in held for s, c in scenes.attributes[i, : scenes.count[i], :2])


def test_attributes_are_uniform():
    scenes = sampled(1, "train", n=20_000)
    values = np.concatenate([scenes.attributes[i, : scenes.count[i]] for i in range(20_000)])
    for a, n in enumerate(scene.N_VALUES):
        shares = np.bincount(values[:, a], minlength=n) / len(values)
        # Shapes 0 to 3 lack two colours each, so they are somewhat rarer.
        assert np.allclose(shares, 1 / n, atol=0.03 if a == 0 else 0.012)


@njit
def draw(streams, i):
    return random.draw(streams, i)


def test_streams_of_neighbours_are_unrelated():
    n = 4000
    streams, rows = np.zeros(n, np.uint64), np.arange(n)
    starts = []
    for split in range(4):
        for episode in range(3):
            random.start(streams, rows, split, rows.astype(np.uint64), np.full(n, episode))
            starts.append(streams.copy())
    starts = np.concatenate(starts)
    assert len(np.unique(starts)) == len(starts)
    bits = np.unpackbits(starts.view(np.uint8)).reshape(-1, 64).mean(0)
    assert np.abs(bits - 0.5).max() < 0.02
    # A step of the stream must not lead into the stream of a neighbour.
    drawn = np.array([[draw(streams, i) for _ in range(4)] for i in range(50)])
    assert len(np.unique(drawn)) == drawn.size


def test_uniform_draws():
    streams = np.zeros(1, np.uint64)

    @njit
    def many(streams, n):
        out = np.empty((2, n))
        for i in range(n):
            out[0, i] = random.uniform(streams, 0)
            out[1, i] = random.below(streams, 0, 7)
        return out

    u, b = many(streams, 70_000)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    assert np.allclose(np.bincount(b.astype(int)) / 70_000, 1 / 7, atol=0.006)
