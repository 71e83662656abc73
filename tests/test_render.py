"""Pictures show what the scene says, at every size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.world import random, render, scene
from mmenvs.world.scene import COLOURS, DIFFICULTIES, SHAPES

every_level = pytest.mark.parametrize("difficulty", range(4))


def sampled(n, difficulty, seed=0):
    scenes, streams, rows = scene.empty(n), np.zeros(n, np.uint64), np.arange(n)
    random.start(streams, rows, 0, np.full(n, seed, np.uint64), rows)
    scene.sample_rows(scenes, rows, streams, DIFFICULTIES[difficulty], 0)
    return scenes


def drawn(scenes, difficulty, size, noise=None):
    level = DIFFICULTIES[difficulty]
    n = scenes.count.size
    out = np.full((n, size, size, 3), 77, np.uint8)
    atlas = render.atlas(size, level.grid, level.rotation)
    render.render_rows(scenes, np.arange(n), atlas, level.noise if noise is None else noise, out)
    return out


def single(shape, colour, large, texture=0, x=0.5, y=0.5, angle=0.0):
    """One scene with one object on the plain background."""
    scenes = scene.empty(1)
    scenes.count[0] = 1
    scenes.attributes[0, 0] = (shape, colour, large, texture)
    scenes.x[0, 0], scenes.y[0, 0], scenes.angle[0, 0] = x, y, angle
    scenes.background[0] = 41
    return scenes


def alone(scenes, i, k):
    """Scene ``i`` with object ``k`` only."""
    one = scene.empty(1)
    for whole, part in zip(scenes, one, strict=True):
        part[0] = whole[i]
    one.count[0] = 1
    for name in ("attributes", "cell", "x", "y", "angle"):
        getattr(one, name)[0, 0] = getattr(scenes, name)[i, k]
    return one


def occupied(picture):
    """Where a picture without noise is not background; a corner pixel may be covered, two can't both be."""
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    values, counts = np.unique(corners, axis=0, return_counts=True)
    return (picture != values[counts.argmax()]).any(-1)


@every_level
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_objects_stand_where_the_scene_says(difficulty, size):
    scenes = sampled(12, difficulty)
    level = DIFFICULTIES[difficulty]
    for i in range(12):
        for k in range(scenes.count[i]):
            covered = occupied(drawn(alone(scenes, i, k), difficulty, size, 0.0)[0])
            ys, xs = np.nonzero(covered)
            off = 0.5 + 0.12 * scene.DIAMETER[1] * size / level.grid
            assert abs(xs.mean() + 0.5 - scenes.x[i, k] * size) < off
            assert abs(ys.mean() + 0.5 - scenes.y[i, k] * size) < off
            # Inside its cell, to the pixel that rounding may cost.
            row, column = divmod(int(scenes.cell[i, k]), level.grid)
            assert np.floor(column * size / level.grid - 0.5) <= xs.min()
            assert xs.max() <= np.ceil((column + 1) * size / level.grid)
            assert np.floor(row * size / level.grid - 0.5) <= ys.min()
            assert ys.max() <= np.ceil((row + 1) * size / level.grid)


@every_level
@settings(max_examples=25, deadline=None)
@given(half=st.integers(16, 256), seed=st.integers(0, 2**63))
def test_every_even_size_without_overlap_or_cut(difficulty, half, seed):
    """The whole picture holds exactly the pixels of its objects drawn one by one."""
    size = 2 * half
    if size > 256:
        difficulty = 0  # the atlas of turned sprites at these sizes takes seconds
    scenes = sampled(2, difficulty, seed)
    pictures = drawn(scenes, difficulty, size, 0.0)
    for i in range(2):
        parts = [
            drawn(alone(scenes, i, k), difficulty, size, 0.0)[0].astype(int) for k in range(scenes.count[i])
        ]
        ground = np.median(np.stack([p.reshape(-1, 3) for p in parts]), axis=(0, 1)).astype(int)
        masks = [(p != ground).any(-1) for p in parts]
        assert np.sum(masks, axis=0).max() == 1
        together = ground + sum(p - ground for p in parts)
        assert (pictures[i] == together).all()


@pytest.mark.parametrize("size", [32, 64, 300])
@pytest.mark.parametrize("grid, rotation", [(3, 0.0), (4, 15.0)])
def test_no_sprite_is_cut_at_its_own_edge(size, grid, rotation):
    """A shape reaches the edge of its sprite with points and rims, never along a stretch of it."""
    atlas = render.atlas(size, grid, rotation)
    for side, line, start in zip(atlas.side, atlas.line, atlas.start, strict=True):
        count = len(SHAPES) * 3 * (2 * atlas.turns + 1)
        sprites = atlas.clear[start : start + count * side * line].reshape(count, side, line)
        opaque = sprites[:, :, : 3 * side : 3] == 0
        edges = [opaque[:, 0], opaque[:, -1], opaque[:, :, 0], opaque[:, :, -1]]
        # The widest is the arm of the cross, 0.3 of a side wide, or a circle's rim.
        assert max(edge.sum(-1).max() for edge in edges) <= 0.42 * side + 1
        assert (sprites[:, :, 3 * side :] == 128).all()


@pytest.mark.parametrize("colour", range(8), ids=COLOURS)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_solid_objects_have_the_colour_of_the_palette(colour, size):
    picture = drawn(single(1, colour, 1), 0, size)[0]
    assert (picture[size // 2, size // 2] == render.PALETTE[colour]).all()
    assert (picture[0, 0] == 41).all()


def test_brightness_scales_objects_and_background():
    scenes = single(1, COLOURS.index("green"), 1)
    scenes.brightness[0] = 0.5
    picture = drawn(scenes, 0, 64)[0].astype(float)
    assert np.allclose(picture[32, 32], render.PALETTE[COLOURS.index("green")] * 0.5, atol=1)
    assert np.allclose(picture[0, 0], 41 * 0.5, atol=1)
    scenes.brightness[0] = 9.0
    assert (drawn(scenes, 0, 64)[0, 0, 0] == 255).all()  # saturates, doesn't wrap


@pytest.mark.parametrize("grid, rotation", [(3, 0.0), (4, 0.0)])
@pytest.mark.parametrize("large", [0, 1])
def test_looks_differ_clearly_at_64_pixels(grid, rotation, large):
    """Any two of the 24 looks (shape, texture) differ in light by 3 % of a sprite's area or more."""
    atlas = render.atlas(64, grid, rotation)
    side, line = int(atlas.side[large]), int(atlas.line[large])
    first = int(atlas.start[large])
    ink = atlas.ink[first : first + 24 * side * line].reshape(24, side, line)[:, :, : 3 * side : 3] / 128
    for a in range(24):
        for b in range(a):
            assert np.abs(ink[a] - ink[b]).sum() > 0.03 * side * side, (a, b)


def test_sizes_differ_and_rotation_turns_counter_clockwise():
    small, large = (occupied(drawn(single(1, 0, size), 0, 64)[0]).sum() for size in (0, 1))
    assert large > 2 * small
    atlas = render.atlas(200, 4, 15.0)
    out = np.zeros((2, 200, 200, 3), np.uint8)
    for i, angle in enumerate((-15.0, 15.0)):
        picture = np.zeros((1, 200, 200, 3), np.uint8)
        render.render_rows(single(2, 7, 1, angle=angle), np.zeros(1, np.int64), atlas, 0.0, picture)
        out[i] = picture[0]
    tops = [np.nonzero((picture != 41).any(-1)) for picture in out]
    tip_right, tip_left = (xs[ys.argmin()] for ys, xs in tops)
    assert tip_left < 100 < tip_right  # counter-clockwise takes the tip of a triangle to the left
    assert np.abs(out[0].astype(int) - out[1][:, ::-1]).mean() < 1.0  # mirror images


@every_level
def test_same_bytes_for_any_subset_of_rows(difficulty):
    scenes, level = sampled(40, difficulty), DIFFICULTIES[difficulty]
    whole = drawn(scenes, difficulty, 64)
    atlas = render.atlas(64, level.grid, level.rotation)
    out = np.full_like(whole, 5)
    rows = np.array([31, 3, 17])
    render.render_rows(scenes, rows, atlas, level.noise, out)
    assert (out[rows] == whole[rows]).all()
    assert (np.delete(out, rows, 0) == 5).all()


@pytest.mark.parametrize("size", [34, 64])
@pytest.mark.parametrize("offset", [0, 1, 63])
def test_same_bytes_past_the_caches(size, offset):
    level, picture = DIFFICULTIES[3], 3 * size * size
    n = render._IN_CACHE // picture + 10
    scenes, atlas = sampled(n, 3), render.atlas(size, level.grid, level.rotation)
    # Anywhere in memory: vectors are written to multiples of their size alone.
    memory = np.full(n * picture + 64, 5, np.uint8)
    out = memory[offset : offset + n * picture].reshape(n, size, size, 3)
    render.render_rows(scenes, np.arange(n), atlas, level.noise, out)
    for first in range(0, n, n // 5):
        rows = np.arange(first, min(first + n // 5, n))
        some = np.zeros((rows.size, size, size, 3), np.uint8)
        few = type(scenes)(*(part[rows] for part in scenes))
        render.render_rows(few, np.arange(rows.size), atlas, level.noise, some)
        assert (out[rows] == some).all()
    assert (memory[:offset] == 5).all() and (memory[offset + n * picture :] == 5).all()


@pytest.mark.parametrize("half_width", [4.0, 10.0, 20.0])
def test_noise_is_uniform_centred_and_bounded(half_width):
    scenes = scene.empty(50)
    scenes.background[:] = 100
    scenes.noise_key[:] = np.arange(50) * 977
    level = DIFFICULTIES[0]
    out = np.zeros((50, 64, 64, 3), np.uint8)
    render.render_rows(scenes, np.arange(50), render.atlas(64, level.grid, 0.0), half_width, out)
    noise = out.astype(int) - 100
    assert noise.min() == -half_width and noise.max() == half_width
    assert abs(noise.mean()) < 0.1 * half_width
    spread = half_width / np.sqrt(3)
    assert noise.std() == pytest.approx(spread, rel=0.15)
    # Neither channels nor neighbours nor scenes share their noise.
    flat = noise.reshape(50, -1)
    assert np.abs(np.corrcoef(flat)[~np.eye(50, dtype=bool)]).max() < 0.15
    assert abs(np.corrcoef(flat[:, :-1].ravel(), flat[:, 1:].ravel())[0, 1]) < 0.02
    scenes.background[:] = 0
    render.render_rows(scenes, np.arange(50), render.atlas(64, level.grid, 0.0), half_width, out)
    assert out.max() == half_width and (out == 0).mean() > 0.4
