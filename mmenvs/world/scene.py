"""Scenes: what stands where. Everything seen, heard and told is made from these arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import uint64

from mmenvs.world.kernels import inlined, kernel
from mmenvs.world.random import below, draw, mix, uniform

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "diamond", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES = ("small", "large")
TEXTURES = ("solid", "striped", "dotted")
ATTRIBUTES = ("shape", "colour", "size", "texture")
N_VALUES = (len(SHAPES), len(COLOURS), len(SIZES), len(TEXTURES))
MAX_OBJECTS = 10
SPLITS = ("train", "val", "test", "compositional")
# Diameter of an object as a share of its grid cell; the rest of the cell is room for jitter.
DIAMETER = (0.56, 0.88)


class Level(NamedTuple):
    """What one difficulty means. ``DIFFICULTIES`` is the only table of it."""

    objects_min: int
    objects_max: int
    grid: int  # cells per side; at most one object stands in a cell
    shapes: int  # how many of SHAPES occur
    textures: int  # how many of TEXTURES occur
    background: float  # largest deviation of the background from dark grey, in [0, 1]
    brightness: float  # the picture is scaled by 1 +- this
    noise: float  # half width of the uniform pixel noise, in grey levels out of 255
    rotation: float  # objects are turned by up to this many degrees either way
    audio_noise: float  # standard deviation of the noise added to sounds
    question_types: int  # how many of questions.TYPES are asked


DIFFICULTIES: tuple[Level, ...] = (
    Level(1, 2, 2, 4, 1, 0.00, 0.00, 0.0, 0.0, 0.000, 4),
    Level(2, 3, 3, 8, 3, 0.05, 0.10, 4.0, 0.0, 0.005, 8),
    Level(3, 6, 4, 8, 3, 0.10, 0.20, 10.0, 10.0, 0.010, 10),
    Level(4, 10, 4, 8, 3, 0.15, 0.30, 20.0, 15.0, 0.020, 12),
)


class Scenes(NamedTuple):
    """A batch of n scenes. Objects stand in reading order: by rows from the top, each from the left."""

    count: npt.NDArray[np.int64]  # type: ignore[assignment]  # (n,) number of objects
    attributes: npt.NDArray[np.uint8]  # (n, MAX_OBJECTS, 4) ids in the order of ATTRIBUTES
    cell: npt.NDArray[np.uint8]  # (n, MAX_OBJECTS) grid cell = row * grid + column, ascending
    x: npt.NDArray[np.float32]  # (n, MAX_OBJECTS) centre from the left, as a share of the width
    y: npt.NDArray[np.float32]  # (n, MAX_OBJECTS) centre from the top, as a share of the height
    angle: npt.NDArray[np.float32]  # (n, MAX_OBJECTS) degrees, counter-clockwise
    background: npt.NDArray[np.uint8]  # (n, 3) RGB
    brightness: npt.NDArray[np.float32]  # (n,) factor on the objects and the background
    noise_key: npt.NDArray[np.uint64]  # (n,) seeds the pixel and sound noise of the scene


def empty(n: int) -> Scenes:
    """Room for ``n`` scenes."""
    return Scenes(
        np.zeros(n, np.int64),
        np.zeros((n, MAX_OBJECTS, 4), np.uint8),
        np.zeros((n, MAX_OBJECTS), np.uint8),
        np.zeros((n, MAX_OBJECTS), np.float32),
        np.zeros((n, MAX_OBJECTS), np.float32),
        np.zeros((n, MAX_OBJECTS), np.float32),
        np.zeros((n, 3), np.uint8),
        np.ones(n, np.float32),
        np.zeros(n, np.uint64),
    )


@inlined
def values_of(level, a):
    """How many values attribute ``a`` takes at a level."""
    if a == 0:
        return level.shapes
    if a == 3:
        return level.textures
    return N_VALUES[a]


@inlined
def held_out(shape, colour):
    """Whether (shape, colour) occurs in the compositional split only: 8 of the 64 pairs.

    The first four shapes lack two colours each, every colour lacks one shape, so that each value by
    itself is seen in training (the CoGenT condition of CLEVR, Johnson et al. 2017).
    """
    # Not "and": a branch here would be guessed wrongly most of the time.
    return (shape < 4) & (colour % 4 == shape)


@inlined
def content_key(scenes: Scenes, i: int) -> int:
    """A hash of what stands where in scene ``i``: cells and attributes; jitter and nuisance don't count."""
    h = uint64(scenes.count[i])
    for k in range(scenes.count[i]):
        packed = uint64(scenes.cell[i, k])
        for a in range(4):
            packed = packed * uint64(16) + uint64(scenes.attributes[i, k, a])
        h = mix(h + packed)
    return h


@inlined
def in_split(scenes: Scenes, i: int, split: int) -> bool:
    """Whether scene ``i`` belongs to ``SPLITS[split]``.

    Scenes without a held-out pair are dealt to train, val and test 8 : 1 : 1 by their content hash; the
    compositional split takes those with at least one.
    """
    novel = False
    for k in range(scenes.count[i]):
        novel |= held_out(scenes.attributes[i, k, 0], scenes.attributes[i, k, 1])
    if split == 3:
        return novel
    if novel:
        return False
    bucket = content_key(scenes, i) % uint64(10)
    if split == 0:
        return bool(bucket < uint64(8))
    return bool(bucket == uint64(7 + split))


@inlined
def sample_layout(scenes: Scenes, i: int, streams, row: int, level: Level) -> None:
    """Choose distinct cells for ``scenes.count[i]`` objects of scene ``i``, in reading order."""
    n_cells = level.grid * level.grid
    chosen = uint64(0)
    left = scenes.count[i]
    while left > 0:
        c = below(streams, row, n_cells)
        if not (chosen >> uint64(c)) & uint64(1):
            chosen |= uint64(1) << uint64(c)
            left -= 1
    k = 0
    for c in range(n_cells):
        if (chosen >> uint64(c)) & uint64(1):
            scenes.cell[i, k] = c
            k += 1


@inlined
def sample_object(scenes: Scenes, i: int, k: int, streams, row: int, level: Level, novel: bool) -> None:
    """Draw the attributes of object ``k``: a held-out pair if ``novel``, never one otherwise."""
    while True:
        shape = below(streams, row, 4 if novel else level.shapes)
        colour = below(streams, row, 8)
        if held_out(shape, colour) == novel:
            break
    scenes.attributes[i, k, 0] = shape
    scenes.attributes[i, k, 1] = colour
    scenes.attributes[i, k, 2] = below(streams, row, 2)
    scenes.attributes[i, k, 3] = below(streams, row, level.textures)


@inlined
def sample_objects(scenes: Scenes, i: int, streams, row: int, level: Level, split: int) -> None:
    """Draw all objects of scene ``i``; in the compositional split each is a held-out pair half the time."""
    sure = below(streams, row, scenes.count[i])
    for k in range(scenes.count[i]):
        novel = split == 3 and (k == sure or below(streams, row, 2) == 0)
        sample_object(scenes, i, k, streams, row, level, novel)


@inlined
def finish(scenes: Scenes, i: int, streams, row: int, level: Level) -> None:
    """Draw what content doesn't fix: jitter within the cells, rotation, background, brightness, noise."""
    for k in range(scenes.count[i]):
        size = scenes.attributes[i, k, 2]
        # The jitter leaves a margin of 2 % of a cell, so that neighbours never touch.
        room = 0.98 - DIAMETER[size]
        cx = scenes.cell[i, k] % level.grid + 0.5 + (uniform(streams, row) - 0.5) * room
        cy = scenes.cell[i, k] // level.grid + 0.5 + (uniform(streams, row) - 0.5) * room
        scenes.x[i, k] = cx / level.grid
        scenes.y[i, k] = cy / level.grid
        scenes.angle[i, k] = (2.0 * uniform(streams, row) - 1.0) * level.rotation
    for c in range(3):
        shade = 0.16 + (2.0 * uniform(streams, row) - 1.0) * level.background
        scenes.background[i, c] = np.uint8(255.0 * min(max(shade, 0.0), 1.0) + 0.5)
    scenes.brightness[i] = 1.0 + (2.0 * uniform(streams, row) - 1.0) * level.brightness
    scenes.noise_key[i] = draw(streams, row)


@inlined
def sample(scenes: Scenes, i: int, streams, row: int, level: Level, split: int) -> None:
    """Draw scene ``i`` of the split from stream ``row``."""
    while True:
        scenes.count[i] = level.objects_min + below(streams, row, level.objects_max - level.objects_min + 1)
        sample_layout(scenes, i, streams, row, level)
        sample_objects(scenes, i, streams, row, level, split)
        if in_split(scenes, i, split):
            break
    finish(scenes, i, streams, row, level)


@kernel
def sample_rows(scenes: Scenes, rows, streams, level: Level, split: int) -> None:
    """Draw scenes ``rows``, each from the stream of its own row."""
    for j in range(rows.size):
        sample(scenes, rows[j], streams, rows[j], level, split)


def words(scenes: Scenes, i: int) -> list[dict[str, str]]:
    """The objects of scene ``i`` in words, in reading order."""
    names = (SHAPES, COLOURS, SIZES, TEXTURES)
    return [
        {attribute: names[a][scenes.attributes[i, k, a]] for a, attribute in enumerate(ATTRIBUTES)}
        for k in range(scenes.count[i])
    ]
