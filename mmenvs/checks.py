"""Checks of arguments: each gives the value back or raises an error that names what is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """``value`` if it is allowed, else a ``ValueError`` that says what is."""
    if value not in allowed or isinstance(value, bool):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def integer_in(name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int if it is an integer in [low, high], else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")
    return int(value)


def number_in(name: str, value: Any, low: float, high: float) -> float:
    """``value`` as a float if it is a number in [low, high], else an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, got {value}")
    return float(value)


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_env_kwargs(env_kwargs: Any) -> None:
    """That these can be arguments of an environment."""
    if env_kwargs is not None and not isinstance(env_kwargs, Mapping):
        raise TypeError(f"env_kwargs must be a dict of arguments of the environment, got {env_kwargs!r}")


def check_image_size(value: Any) -> int:
    """An even picture size from 32 to 512 pixels."""
    size = integer_in("image_size", value, 32, 512)
    if size % 2:
        raise ValueError(f"image_size must be even, got {size}")
    return size


def check_seconds(value: Any) -> float:
    """A length of sound from 0.5 to 2 seconds."""
    return number_in("seconds", value, 0.5, 2.0)
