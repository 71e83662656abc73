"""Agents of Stable-Baselines3: made by their recipes (``agent.py``), trained (``training.py``) and saved (``saving.py``)."""

from mmenvs.embeddings.embedding import resolve_device

from .agent import Settings, check_encoders, default_precision, make_agent, settings_of
from .saving import load, save
from .training import progress_line, train

__all__ = [
    "Settings",
    "check_encoders",
    "default_precision",
    "load",
    "make_agent",
    "progress_line",
    "resolve_device",
    "save",
    "settings_of",
    "train",
]
