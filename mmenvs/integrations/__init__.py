"""Adapters to other libraries, one module each; the library is imported when its module is first used."""

from __future__ import annotations

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name not in ("ray", "sb3"):
        raise AttributeError(f"module 'mmenvs.integrations' has no attribute {name!r}; there are ray, sb3")
    return importlib.import_module(f"mmenvs.integrations.{name}")
