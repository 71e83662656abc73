"""Adapters to other libraries, one module each; the library is imported when its module is first used."""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = ("ray", "sb3", "trl")


def __getattr__(name: str) -> ModuleType:
    if name not in _MODULES:
        raise AttributeError(
            f"module 'mmenvs.integrations' has no attribute {name!r}; there are {', '.join(_MODULES)}"
        )
    return importlib.import_module(f"mmenvs.integrations.{name}")
