"""Observation spaces of each modality, and the way back from a space to its modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from gymnasium import spaces

Modality = Literal["image", "images", "text", "audio", "vector", "tokens"]
SAMPLE_RATE = 16_000
_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


def image(size: int) -> spaces.Box:
    """One RGB picture, ``(size, size, 3)`` uint8."""
    return spaces.Box(0, 255, (size, size, 3), np.uint8)


def images(count: int, size: int) -> spaces.Box:
    """A set of pictures or the frames of a film, ``(count, size, size, 3)`` uint8."""
    return spaces.Box(0, 255, (count, size, size, 3), np.uint8)


def text(vocabulary_size: int, length: int) -> spaces.Box:
    """Word ids, ``(length,)`` int64, 0 is padding."""
    return spaces.Box(0, vocabulary_size - 1, (length,), np.int64)


def audio(samples: int) -> spaces.Box:
    """Mono sound at 16 kHz, ``(samples,)`` float32 in [-1, 1]."""
    return spaces.Box(-1.0, 1.0, (samples,), np.float32)


def tokens(count: int, size: int) -> spaces.Box:
    """Vectors that a frozen encoder left, ``(count, size)`` float32, unbounded."""
    return spaces.Box(-np.inf, np.inf, (count, size), np.float32)


def channels_last(shape: Sequence[int]) -> bool:
    """Whether the channels of a picture ``(H, W, C)``, or of a set ``(K, H, W, C)``, stand last.

    They do where the last axis can be channels: 1, 3 or 4. Otherwise they stand before height and width.
    """
    return shape[-1] in _CHANNELS


def picture_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of a picture, or of each one of a set, wherever its channels stand.

    Raises:
        ValueError: if neither end is 1, 3 or 4.
    """
    if len(shape) not in (3, 4) or not (channels_last(shape) or shape[-3] in _CHANNELS):
        raise ValueError(
            "pictures must be (H, W, C) or (C, H, W), sets of them (K, H, W, C) or (K, C, H, W), with C 1, 3 or 4, "
            f"got {tuple(shape)}"
        )
    *_, first, middle, last = shape
    return (last, first, middle) if channels_last(shape) else (first, middle, last)


def modality_of(space: spaces.Space) -> Modality:
    """Read the modality of one observation off its dtype, bounds and shape.

    uint8 ``(H, W, 3)`` (or the ``(3, H, W)`` that Stable-Baselines3 makes of it) is an image, uint8 with
    four axes is a set of images, an integer vector from 0 on is text, a float vector bounded by [-1, 1] or two such
    channels is audio, any other float vector is a plain vector. A float matrix of other bounds is tokens,
    ``(T, D)``; one of [-1, 1] that is too short for sound must be named.

    Raises:
        TypeError: if ``space`` is not a ``Box``.
        ValueError: if no modality fits; name it in ``modalities={...}`` then.
    """
    if not isinstance(space, spaces.Box):
        raise TypeError(f"an observation must be a Box space, got {type(space).__name__}")
    shape, dtype = space.shape, space.dtype
    if dtype == np.uint8 and len(shape) == 3 and 3 in (shape[0], shape[-1]):
        return "image"
    if dtype == np.uint8 and len(shape) == 4 and 3 in (shape[1], shape[-1]):
        return "images"
    words = dtype is not None and np.issubdtype(dtype, np.integer) and dtype != np.uint8
    if words and len(shape) == 1 and np.all(space.low >= 0):
        return "text"
    if dtype is not None and np.issubdtype(dtype, np.floating) and len(shape) in (1, 2):
        like_sound = bool(np.all(space.low == -1) and np.all(space.high == 1))
        if like_sound and shape[-1] >= 1000:
            return "audio"
        if len(shape) == 1:
            return "vector"
        if not like_sound:
            return "tokens"
    raise ValueError(
        f"no modality fits {space}: expected uint8 (H, W, 3) for an image, "
        "uint8 (K, H, W, 3) for images, int64 (L,) from 0 on for text, float32 (T,) or (C, T) in [-1, 1] for audio, "
        "float (D,) for a vector, float32 (T, D) of other bounds for tokens"
    )
