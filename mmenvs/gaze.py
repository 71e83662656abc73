"""What an agent looks at, drawn on the panels of its episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

BAR = 58  # height of the bar of weights with its legend
_LIGHT, _OPACITY = np.array([255.0, 236, 170]), 0.55  # pale, so that the colours below keep their names
_SHARES = ((54, 96, 168), (224, 138, 40), (60, 150, 110), (160, 80, 160), (120, 120, 120))


class Gaze(NamedTuple):
    """What an agent looks at in one observation.

    Attributes:
        heat: float ``(K, h, w)`` in [0, 1], for each cell of each picture; None draws none.
        weights: share of each observation, by name; together 1. None draws none.
        caption: what that is, in words.
    """

    heat: npt.NDArray[np.float32] | None = None
    weights: Mapping[str, float] | None = None
    caption: str = ""


_current: ContextVar[Gaze] = ContextVar("gaze", default=Gaze())  # noqa: B039, a tuple of None


def current() -> Gaze:
    """What panels draw."""
    return _current.get()


@contextmanager
def showing(gaze: Gaze) -> Iterator[None]:
    """Panels that are made in the block show ``gaze``: tasks render themselves, and know of no agent."""
    token = _current.set(gaze)
    try:
        yield
    finally:
        _current.reset(token)


def tinted(pictures: Sequence[Image.Image], heat: npt.NDArray[np.float32]) -> list[Image.Image]:
    """Pictures under a translucent layer, clear where the heat is 0 and bright where it is 1.

    Raises:
        ValueError: heat for another number of pictures, or outside [0, 1].
    """
    if heat.ndim != 3 or len(heat) != len(pictures):
        raise ValueError(f"heat must be ({len(pictures)}, h, w), as there are pictures, got {heat.shape}")
    if not (np.all(heat >= 0) and np.all(heat <= 1)):
        raise ValueError(f"heat must be from 0 to 1, got {heat.min()} to {heat.max()}")
    layers = []
    for picture, cells in zip(pictures, heat, strict=True):
        whole = Image.fromarray(np.asarray(cells, np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
        opacity = _OPACITY * np.asarray(whole)[..., None]
        layers.append(
            Image.fromarray((np.asarray(picture) * (1 - opacity) + _LIGHT * opacity).astype(np.uint8))
        )
    return layers


def draw_weights(
    draw: ImageDraw.ImageDraw,
    weights: Mapping[str, float],
    x: int,
    y: int,
    width: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    """A bar of ``width`` pixels parted by the weights, and below it whose part is which."""
    left, label = float(x), x
    for number, (name, weight) in enumerate(weights.items()):
        colour = _SHARES[number % len(_SHARES)]
        draw.rectangle((left, y, left + weight * width, y + 16), fill=colour)
        left += weight * width
        text = f"{name} {weight:.2f}"
        draw.rectangle((label, y + 29, label + 11, y + 40), fill=colour)
        draw.text((label + 18, y + 23), text, (28, 30, 36), font)
        label += 18 + round(font.getlength(text)) + 24
