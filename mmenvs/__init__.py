"""Multimodal reinforcement learning environments for Gymnasium.

Importing this package registers every ``MMRL/*`` id. What needs torch, transformers or
Stable-Baselines3 is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mmenvs.registry import SPECS, register

if TYPE_CHECKING:
    from mmenvs import datasets, embeddings, integrations, rewards
    from mmenvs.embeddings import Extractor
    from mmenvs.integrations.sb3 import MultimodalExtractor
    from mmenvs.wrappers import EmbedObservation, VectorEmbedObservation

__version__ = "0.1.0"
__all__ = [
    "SPECS",
    "EmbedObservation",
    "Extractor",
    "MultimodalExtractor",
    "VectorEmbedObservation",
    "datasets",
    "embeddings",
    "integrations",
    "register",
    "rewards",
]

_LAZY = {
    "EmbedObservation": "mmenvs.wrappers",
    "Extractor": "mmenvs.embeddings",
    "MultimodalExtractor": "mmenvs.integrations.sb3",
    "VectorEmbedObservation": "mmenvs.wrappers",
    "datasets": "",
    "embeddings": "",
    "integrations": "",
    "rewards": "",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmenvs' has no attribute {name!r}")
    if not _LAZY[name]:
        return importlib.import_module(f"mmenvs.{name}")
    return getattr(importlib.import_module(_LAZY[name]), name)
