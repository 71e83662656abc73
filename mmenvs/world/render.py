"""Pictures of scenes: anti-aliased sprites drawn once, then composed by compiled kernels."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, uint64, void
from numba.core import cgutils
from numba.extending import intrinsic
from PIL import Image, ImageDraw

from mmenvs.world.kernels import inlined
from mmenvs.world.random import hash2, words
from mmenvs.world.scene import DIAMETER, SHAPES, SIZES, TEXTURES, Scenes

# One RGB triple for each of scene.COLOURS.
PALETTE: npt.NDArray[np.uint8] = np.array(
    [
        (228, 30, 38),  # red
        (255, 132, 0),  # orange
        (250, 228, 40),  # yellow
        (30, 180, 50),  # green
        (60, 220, 232),  # cyan
        (46, 92, 255),  # blue
        (186, 50, 222),  # purple
        (242, 242, 242),  # white
    ],
    np.uint8,
)
ANGLE_STEP = 3.0  # sprites are drawn for multiples of this many degrees
_DARK = 0.42  # the dark parts of a texture, as a share of the colour
_FULL = 128  # weight of an opaque pixel; at most 128, so that weighted bytes add up within 16 bits
_NOISE_BYTES = 1 << 14
_CHUNK = 1536  # bytes of a picture that read one stretch of the noise
_STRETCH = 192  # bytes of background laid at a time: whole pixels and whole vectors
_VECTOR = 64  # bytes of the widest vector store
_IN_CACHE = 1 << 22  # bytes of pictures up to which a cache may still hold them when they are looked at
_BLOCK = 64  # sprite lines are padded to a multiple of this, the step of the widest vector loop


class Atlas(NamedTuple):
    """All sprites at one picture size, grid and rotation; the colour is applied when they are placed.

    A byte under a sprite becomes ``(byte * clear + colour * ink) / 128``. Each weight is stored three
    times over, once for each channel, and lines are padded to whole blocks that change nothing.
    """

    ink: npt.NDArray[np.uint8]  # flat (sizes) x (shapes, textures, angles, side, line), 0 to 128
    clear: npt.NDArray[np.uint8]  # the same shape, 0 to 128
    start: npt.NDArray[np.int64]  # (2,) where the sprites of each size begin
    side: npt.NDArray[np.int64]  # (2,) width and height of a sprite of each size, in pixels
    line: npt.NDArray[np.int64]  # (2,) bytes in a line of a sprite of each size, a multiple of _BLOCK
    turns: int  # angles run from -turns to turns, in steps of ANGLE_STEP degrees
    noise: npt.NDArray[np.uint8]  # random bytes, of which pictures read stretches


def side_of(size: int, grid: int, size_class: int) -> int:
    """Width in pixels of the sprites of one size class (0 small, 1 large) in pictures of ``size`` pixels.

    The 2 % of a cell that ``scene.finish`` keeps free may be used up: rounding whole sprites to whole
    pixels keeps their order, so neighbours still don't overlap and nothing leaves the picture.
    """
    return int((DIAMETER[size_class] + 0.02) * size / grid)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in [-1, 1], y pointing down, around its centre of mass.

    All shapes stay in the box when turned by 15 degrees.
    """
    if shape in ("circle", "ring"):
        return [(0.96 * math.cos(t), 0.96 * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 90)]
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "triangle":
        return [(0.0, -1.0), (0.866, 0.5), (-0.866, 0.5)]
    if shape == "star":
        radii = (1.0, 0.4) * 5
        return [(r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5)) for k, r in enumerate(radii)]
    if shape == "heart":
        ts = np.linspace(0, 2 * math.pi, 90)
        xs = 16 * np.sin(ts) ** 3
        ys = -(13 * np.cos(ts) - 5 * np.cos(2 * ts) - 2 * np.cos(3 * ts) - np.cos(4 * ts))
        return [(x / 17.5, (y - 1.0) / 17.5) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
    if shape == "cross":
        a, b = 0.3, 0.95
        quarter = [(a, -b), (a, -a), (b, -a)]
        corners = []
        for _ in range(4):
            corners += quarter
            quarter = [(-y, x) for x, y in quarter]
        return corners
    return [(0.0, -1.0), (0.66, 0.0), (0.0, 1.0), (-0.66, 0.0)]  # diamond


def _turned(points: list[tuple[float, float]], degrees: float) -> list[tuple[float, float]]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [(c * x + s * y, c * y - s * x) for x, y in points]


def _sprite(shape: str, texture: str, side: int, degrees: float) -> tuple[npt.NDArray[np.float64], ...]:
    """Coverage and darkness of one sprite, each ``(side, side)`` in [0, 1], averaged over fine pixels."""
    fine = max(4, min(16, 512 // side))
    n = side * fine

    def polygon(canvas: ImageDraw.ImageDraw, points: list[tuple[float, float]], value: int) -> None:
        canvas.polygon([((x + 1) * n / 2 - 0.5, (y + 1) * n / 2 - 0.5) for x, y in points], fill=value)

    mask = Image.new("L", (n, n), 0)
    canvas = ImageDraw.Draw(mask)
    polygon(canvas, _turned(_outline(shape), degrees), 1)
    if shape == "ring":
        polygon(canvas, [(0.5 * x, 0.5 * y) for x, y in _outline(shape)], 0)

    # Stripes and dots repeat four times over the sprite, but never finer than pixels can show.
    period = 2.0 / max(1.0, min(4.0, side / 4.0))
    dark = Image.new("L", (n, n), 0)
    canvas = ImageDraw.Draw(dark)
    places = [k * period for k in range(-4, 5)]
    if texture == "striped":
        for y in places:
            q = period / 4
            polygon(canvas, _turned([(-2, y - q), (2, y - q), (2, y + q), (-2, y + q)], degrees), 1)
    if texture == "dotted":
        ring = [(0.36 * period * math.cos(t), 0.36 * period * math.sin(t)) for t in np.linspace(0, 6.1, 16)]
        for cy in places:
            for cx in places:
                polygon(canvas, _turned([(cx + x, cy + y) for x, y in ring], degrees), 1)

    inside = np.asarray(mask)
    both = inside * np.asarray(dark)
    return tuple(a.reshape(side, fine, side, fine).mean((1, 3)) for a in (inside, both))


@lru_cache(maxsize=32)
def atlas(size: int, grid: int, rotation: float) -> Atlas:
    """Draw the sprites for pictures of ``size`` pixels, once.

    Args:
        size: width and height of the pictures, even, 32 to 512.
        grid: cells a side, as in :class:`mmenvs.world.scene.Level`.
        rotation: objects are turned by up to this many degrees either way, at most 15.
    """
    turns = int(rotation / ANGLE_STEP + 0.5)
    sides = [side_of(size, grid, s) for s in range(len(SIZES))]
    lines = [-(-3 * side // _BLOCK) * _BLOCK for side in sides]
    inks: list[npt.NDArray[np.uint8]] = []
    clears: list[npt.NDArray[np.uint8]] = []
    start: list[int] = []
    for side, line in zip(sides, lines, strict=True):
        start.append(sum(ink.size for ink in inks))
        for shape in SHAPES:
            for texture in TEXTURES:
                for turn in range(-turns, turns + 1):
                    cover, dark = _sprite(shape, texture, side, turn * ANGLE_STEP)
                    ink = np.zeros((side, line), np.uint8)
                    clear = np.full((side, line), _FULL, np.uint8)
                    clear[:, : 3 * side] -= np.repeat(np.rint(cover * _FULL).astype(np.uint8), 3, axis=1)
                    lit = np.rint((cover - (1 - _DARK) * dark) * _FULL).astype(np.uint8)
                    ink[:, : 3 * side] = np.repeat(lit, 3, axis=1)
                    inks.append(ink.ravel())
                    clears.append(clear.ravel())
    return Atlas(
        np.concatenate(inks),
        np.concatenate(clears),
        np.array(start),
        np.array(sides),
        np.array(lines),
        turns,
        _noise_bytes(),
    )


@lru_cache(maxsize=1)
def _noise_bytes() -> npt.NDArray[np.uint8]:
    # Little-endian on every machine, so that the bytes are the same everywhere.
    return words(_NOISE_BYTES // 8, 0).astype("<u8").view(np.uint8)


@inlined
def _byte(value):
    return np.uint8(min(max(value, 0.0), 255.0) + 0.5)


@njit(cache=True, nogil=True)
def render_rows(scenes: Scenes, rows, atlas: Atlas, noise: float, out) -> None:
    """Draw scenes ``rows`` into ``out[rows]``, uint8 ``(n, H, W, 3)``, C-contiguous.

    ``noise`` is the half width of the uniform noise of every byte, in grey levels; it depends on the
    scene's ``noise_key`` alone.
    """
    n, height, width = out.shape[0], out.shape[1], out.shape[2]
    total = uint64(3 * width * height)
    pictures = out.reshape(n, 3 * width * height)
    # Drawn in the fastest cache: what takes longest is to write pictures to where they belong.
    picture = np.empty(total, np.uint8)
    chunk = uint64(_CHUNK)
    background = np.zeros(_STRETCH, np.uint8)
    paint = np.empty(atlas.line.max(), np.uint8)
    # Noise is what is added, saturating, and then what is taken away: one of the two is 0.
    more = np.zeros(atlas.noise.size, np.uint8)
    less = np.zeros(atlas.noise.size, np.uint8)
    if noise > 0.0:
        for b in range(atlas.noise.size):
            grey = int(atlas.noise[b]) * int(2.0 * noise + 1.0) // 256 - int(noise)
            more[b] = max(grey, 0)
            less[b] = max(-grey, 0)
    places = uint64(atlas.noise.size - _CHUNK)
    stream = uint64(rows.size) * total > uint64(_IN_CACHE)

    for i in rows:
        _fill(scenes, i, background, picture)
        for k in range(scenes.count[i]):
            _blit(scenes, i, k, atlas, paint, picture, width, height)
        if noise > 0.0:
            for first in range(uint64(0), total, chunk):
                place = hash2(scenes.noise_key[i], first) % places
                for x in range(min(chunk, total - first)):
                    old = picture[first + x]
                    high = np.uint8(old + more[place + x])
                    high = np.uint8(255) if high < old else high
                    low = less[place + x]
                    picture[first + x] = np.uint8(high - low) if high > low else np.uint8(0)
        _hand_over(picture, pictures[i], stream)


@inlined
def _fill(scenes, i, background, picture):
    """Lay the background of scene ``i``. ``background`` holds a stretch of the scene before, which often is of the same colour."""
    red = _byte(scenes.background[i, 0] * scenes.brightness[i])
    green = _byte(scenes.background[i, 1] * scenes.brightness[i])
    blue = _byte(scenes.background[i, 2] * scenes.brightness[i])
    if red != background[0] or green != background[1] or blue != background[2]:
        for x in range(uint64(0), uint64(_STRETCH), uint64(3)):
            background[x], background[x + uint64(1)], background[x + uint64(2)] = red, green, blue
    stretch, total = uint64(_STRETCH), uint64(picture.size)
    first = uint64(0)
    while first + stretch <= total:
        for x in range(stretch):
            picture[first + x] = background[x]
        first += stretch
    for x in range(total - first):
        picture[first + x] = background[x]


@inlined
def _hand_over(picture, target, stream):
    """Copy a picture; past the caches with ``stream``."""
    begin, end = uint64(0), uint64(0)
    if stream:
        begin = uint64(-target.ctypes.data % _VECTOR)
        end = begin + (uint64(picture.size) - begin) // uint64(_VECTOR) * uint64(_VECTOR)
        _stream(picture[begin:end], target[begin:end])  # type: ignore[call-arg]
    for x in range(begin):
        target[x] = picture[x]
    for x in range(uint64(picture.size) - end):
        target[end + x] = picture[end + x]


@intrinsic
def _stream(typing_context, source, target):
    """Copy whole vectors of bytes with non-temporal stores, which don't read from memory what they overwrite.

    ``target`` is aligned to a vector. Threads that look at it later see it, as the lock of Python orders such stores.
    """

    def emit(context, builder, signature, arguments):
        arrays = [
            context.make_array(t)(context, builder, a) for t, a in zip(signature.args, arguments, strict=True)
        ]
        vectors = [
            builder.bitcast(a.data, ir.VectorType(ir.IntType(8), _VECTOR).as_pointer()) for a in arrays
        ]
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        count = builder.udiv(arrays[0].nitems, ir.Constant(arrays[0].nitems.type, _VECTOR))
        with cgutils.for_range(builder, count) as loop:
            read, written = [builder.gep(v, [loop.index]) for v in vectors]
            store = builder.store(builder.load(read, align=1), written, align=_VECTOR)
            store.set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return void(source, target), emit


@inlined
def _blit(scenes, i, k, atlas, paint, picture, width, height):
    """Place object ``k`` of scene ``i`` on its picture, flat ``(H * W * 3,)``."""
    size = scenes.attributes[i, k, 2]
    side = atlas.side[size]
    line = uint64(atlas.line[size])
    colour, light = scenes.attributes[i, k, 1], scenes.brightness[i]
    red, green, blue = (
        _byte(PALETTE[colour, 0] * light),
        _byte(PALETTE[colour, 1] * light),
        _byte(PALETTE[colour, 2] * light),
    )
    for x in range(uint64(0), uint64(3 * side), uint64(3)):
        paint[x], paint[x + uint64(1)], paint[x + uint64(2)] = red, green, blue
    turn = int(math.floor(scenes.angle[i, k] / ANGLE_STEP + 0.5))
    turn = min(max(turn, -atlas.turns), atlas.turns) + atlas.turns
    look = int(scenes.attributes[i, k, 0]) * len(TEXTURES) + int(scenes.attributes[i, k, 3])
    source = uint64(atlas.start[size] + (look * (2 * atlas.turns + 1) + turn) * side * atlas.line[size])
    # Clamped so that nothing is ever written outside the picture, whatever the scene holds.
    left = int(math.floor(scenes.x[i, k] * width - 0.5 * side + 0.5))
    top = int(math.floor(scenes.y[i, k] * height - 0.5 * side + 0.5))
    left = min(max(left, 0), width - side)
    top = min(max(top, 0), height - side)
    target = uint64(3 * (top * width + left))
    stride = uint64(3 * width)
    total = uint64(3 * width * height)
    for _ in range(side):
        # The padding of a line changes nothing, but must not be written behind the picture.
        for x in range(min(line, total - target)):
            old = np.uint16(picture[target + x]) * np.uint16(atlas.clear[source + x])
            new = np.uint16(paint[x]) * np.uint16(atlas.ink[source + x])
            picture[target + x] = np.uint8(np.uint16(old + new) >> np.uint16(7))
        source += line
        target += stride
