"""Checks of arguments: each gives the value back or raises an error that names what is allowed."""

from __future__ import annotations

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
