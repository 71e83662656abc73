"""Checkpoints: a folder with ``settings.json`` and the tensors it names, never half written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mmenvs
from mmenvs.checks import integer_in
from mmenvs.files import replacing

from ..saved import pack, unpack

FORMAT = 2
KIND = "transformer"
SETTINGS = "settings.json"
COUNTERS = ("steps", "iteration")
PROGRESS = ("level", "episodes", "successes")  # in a curriculum; 0 without one
_JSON_LIMIT = 2**20  # bytes


def write(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    counters: Mapping[str, int],
    coefficients: Mapping[str, float],
    tensors: Mapping[str, Tensor],
) -> None:
    """Write ``state_STEPS.safetensors``, then ``settings.json``, which names it by its ``steps``.

    A write that is cut off at any moment leaves the checkpoint before it in place.
    """
    path = Path(folder)
    state = f"state_{counters['steps']}.safetensors"
    with replacing(path / state) as file:
        file.write_bytes(pack(tensors, {name: str(value) for name, value in counters.items()}))
    versions = {"mmenvs": mmenvs.__version__, "torch": torch.__version__}
    document = {"format": FORMAT, "agent": KIND, **counters, "coefficients": coefficients}
    document |= {"settings": settings, "versions": versions}
    text = json.dumps(document, indent=2)
    with replacing(path / SETTINGS) as file:
        file.write_text(text)
    # Of earlier checkpoints, and of those that were cut off.
    for old in (*path.glob("state_*.safetensors"), *path.glob(".state_*.safetensors")):
        if old.name != state:
            old.unlink()


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    """The settings, the counters and the coefficients of the checkpoint in ``folder``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, of another format or of another kind of agent.
    """
    file = Path(folder) / SETTINGS
    problem = f"cannot load the agent in {str(folder)!r}: "
    if not file.is_file():
        raise FileNotFoundError(
            f"no agent in {str(folder)!r}: there is no {SETTINGS}; 'mmenvs train' writes one"
        )
    if file.stat().st_size > _JSON_LIMIT:
        raise ValueError(f"{problem}{SETTINGS} has over {_JSON_LIMIT} bytes")
    try:
        document = json.loads(file.read_text())
        kind, found = document.get("agent"), document["format"]
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{problem}{SETTINGS} is damaged: it holds no settings of an agent: {error!r}"
        ) from error
    if kind != KIND:
        raise ValueError(f"{problem}it is no transformer agent; mmenvs_agents.sb3.load reads others")
    if found != FORMAT:
        raise ValueError(f"{problem}{SETTINGS} has format {found!r}, this version reads format {FORMAT}")
    try:
        counters = {name: integer_in(name, document[name], 0, 10**15) for name in COUNTERS}
        counters |= {name: integer_in(name, document.get(name, 0), 0, 10**15) for name in PROGRESS}
        coefficients = {str(name): float(value) for name, value in document["coefficients"].items()}
        return dict(document["settings"]), counters, coefficients
    except KeyError as error:
        raise ValueError(f"{problem}{SETTINGS} is damaged: it lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{problem}{SETTINGS} is damaged: {error}") from error


def read_tensors(
    folder: str | os.PathLike[str], counters: Mapping[str, int], device: str
) -> dict[str, Tensor]:
    """The tensors of the checkpoint whose counters :func:`read` gave.

    Raises:
        FileNotFoundError: if their file is missing.
        ValueError: if it is damaged or of another checkpoint.
    """
    file = Path(folder) / f"state_{counters['steps']}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing")
    try:
        tensors, found = unpack(file, device)
    except ValueError as error:
        raise ValueError(f"cannot load the agent in {str(folder)!r}: {error}") from error
    if any(found.get(name, "0") != str(value) for name, value in counters.items()):
        raise ValueError(
            f"cannot load the agent in {str(folder)!r}: {file.name} and {SETTINGS} are of different checkpoints"
        )
    return tensors
