"""Sounds of scenes: every object has a voice, and a scene is heard as its voices in reading order.

Timbre tells the shape, pitch the colour, loudness the size and rhythm the texture. Notes are synthesised
once; compiled kernels only scale and place them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import uint64

from mmenvs.spaces import SAMPLE_RATE
from mmenvs.world.kernels import kernel
from mmenvs.world.random import hash2, words
from mmenvs.world.scene import COLOURS, SHAPES, TEXTURES, Scenes

# Fundamentals of the colours in hertz, a fourth apart (220 to 1,648). Four harmonics stay below 8 kHz.
PITCH = np.array([220.0 * (4.0 / 3.0) ** step for step in range(len(COLOURS))])
# Harmonics 1 to 4 of the shapes: the fundamental always, each of the others or not.
HARMONICS = np.array(
    [[1.0, 0.7 * (s & 1), 0.7 * (s >> 1 & 1), 0.7 * (s >> 2 & 1)] for s in range(len(SHAPES))]
)
LOUDNESS: npt.NDArray[np.float32] = np.array([0.4, 1.0], np.float32)  # factor of each size
NOTES = (1, 2, 4)  # how many notes each texture plays in the time of its object
_SOUNDING = (0.94, 0.72, 0.6)  # share of the time of a note that it sounds
_PEAK = 0.85  # of the loudest voice; 0.15 is room for noise
_EDGE = 0.004  # seconds that a note takes to rise and to fall
_NOISE_SAMPLES = 1 << 15
_CHUNK = 2000  # samples of a sound that read one stretch of the noise
_SALT = 0x50554E44  # sound and picture share a scene's noise key, but nothing that could be heard or seen


class Bank(NamedTuple):
    """All voices for one length of a slot, in which one object is heard."""

    wave: npt.NDArray[np.float32]  # (shapes, colours, slot) sustained notes of equal power
    envelope: npt.NDArray[np.float32]  # (textures, slot) in [0, 1]
    noise: npt.NDArray[np.float32]  # about normal, standard deviation 1, bounded by 3.5


def samples_of(seconds: float) -> int:
    """Number of samples in ``seconds`` of sound."""
    return round(seconds * SAMPLE_RATE)


@lru_cache(maxsize=8)
def bank(seconds: float, slots: int) -> Bank:
    """Synthesise the voices, once.

    Args:
        seconds: length of a whole sound.
        slots: how many objects a sound has room for; each is heard for ``seconds / slots``.
    """
    slot = samples_of(seconds) // slots
    time = np.arange(slot) / SAMPLE_RATE
    order = np.arange(1, HARMONICS.shape[1] + 1)
    partials = np.sin(2 * np.pi * PITCH[:, None, None] * order[:, None] * time)
    wave = np.einsum("sh,cht->sct", HARMONICS, partials)
    wave /= np.sqrt((HARMONICS**2).sum(1) / 2)[:, None, None]
    wave *= _PEAK / np.abs(wave).max()
    envelope = np.stack([_rhythm(slot, texture) for texture in range(len(TEXTURES))])
    return Bank(wave.astype(np.float32), envelope.astype(np.float32), _noise())


def _rhythm(slot: int, texture: int) -> npt.NDArray[np.float64]:
    """The envelope of one object's notes: raised-cosine edges, silence between notes and at both ends."""
    beat = slot / NOTES[texture]
    sounding = _SOUNDING[texture] * beat
    edge = min(_EDGE * SAMPLE_RATE, sounding / 3)
    within = (np.arange(slot) + 0.5) % beat - (beat - sounding) / 2
    inside = np.minimum(within, sounding - within).clip(0, edge) / edge
    return 0.5 - 0.5 * np.cos(np.pi * inside)


@lru_cache(maxsize=1)
def _noise() -> npt.NDArray[np.float32]:
    # Four 16-bit uniforms add up to nearly a normal variable, in integers the same on every machine.
    drawn = words(_NOISE_SAMPLES, _SALT)
    total = sum((drawn >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64) for shift in (0, 16, 32, 48))
    return ((total - 2 * 65535) / (65536 * np.sqrt(1 / 3))).astype(np.float32)


@kernel
def sound_rows(scenes: Scenes, chosen, bank: Bank, noise: float, out, rows) -> None:
    """Play scene ``chosen[j]`` into ``out[rows[j]]``, float32 ``(n, T)`` in (-1, 1), C-contiguous.

    ``noise`` is the standard deviation of the noise; it depends on the scene's ``noise_key`` alone. A scene
    must not have more objects than the bank has slots.
    """
    slot = np.uint64(bank.wave.shape[2])
    length = np.uint64(out.shape[1])
    chunk = uint64(_CHUNK)
    places = uint64(bank.noise.size - _CHUNK)
    level = np.float32(noise)
    for j in range(rows.size):
        i = chosen[j]
        sound = out[rows[j]]
        for k in range(scenes.count[i]):
            shape, colour, size, texture = scenes.attributes[i, k]
            wave = bank.wave[shape, colour]
            envelope = bank.envelope[texture]
            gain = LOUDNESS[size]
            first = np.uint64(k) * slot
            for t in range(slot):
                sound[first + t] = wave[t] * envelope[t] * gain
        for t in range(np.uint64(scenes.count[i]) * slot, length):
            sound[t] = np.float32(0.0)
        if noise > 0.0:
            key = hash2(scenes.noise_key[i], uint64(_SALT))
            for start in range(uint64(0), length, chunk):
                place = hash2(key, start) % places
                for t in range(min(chunk, length - start)):
                    sound[start + t] += level * bank.noise[place + t]
