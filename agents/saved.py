"""What agents of both kinds keep of themselves in files: arguments of their environment, and tensors with a checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor
from xxhash import xxh3_64

from mmenvs.embeddings.encoders import HUGGING_FACE
from mmenvs.embeddings.joint import PREFIX
from mmenvs.embeddings.pretrained import Pretrained
from mmenvs.files import KINDS, check_out

_CHECKSUM = "xxh3_64"


def anchored(encoder: str | Pretrained) -> str | Pretrained:
    """An encoder whose folder or file is named by its whole path, so that an agent that has it loads from anywhere."""
    if isinstance(encoder, str) and encoder.startswith(PREFIX):
        path = encoder.removeprefix(PREFIX)
        return PREFIX + os.path.abspath(path) if os.path.exists(path) else encoder
    return _with_source(encoder, whole_path)


def whole_path(name: str) -> str:
    """The absolute path of a folder that is there; any other name, such as one at Hugging Face, as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def saved_encoders(
    encoders: Mapping[str, Any], then: str | None, now: str | os.PathLike[str]
) -> dict[str, str | Pretrained]:
    """The encoders of an agent's file. Where the path of one has gone, it is taken from where it is as seen from the
    agent's folder: they were moved together.

    Args:
        encoders: as JSON holds them.
        then: the agent's folder when it was saved; agents of before have none.
        now: its folder now.
    """

    def found(path: str) -> str:
        if then is None or not os.path.isabs(path) or os.path.exists(path):
            return path
        there = os.path.normpath(os.path.join(os.path.abspath(now), os.path.relpath(path, then)))
        return there if os.path.exists(there) else path

    def restored(encoder: Any) -> str | Pretrained:
        if isinstance(encoder, str) and encoder.startswith(PREFIX):
            return PREFIX + found(encoder.removeprefix(PREFIX))
        return _with_source(Pretrained(**encoder) if isinstance(encoder, dict) else encoder, found)

    return {name: restored(encoder) for name, encoder in encoders.items()}


def _with_source(encoder: str | Pretrained, change: Callable[[str], str]) -> str | Pretrained:
    """A pretrained encoder with another source; any other as it is."""
    if isinstance(encoder, Pretrained):
        return replace(encoder, source=change(encoder.source))
    if encoder.startswith(HUGGING_FACE):
        return HUGGING_FACE + change(encoder.removeprefix(HUGGING_FACE))
    return encoder


def kept_arguments(env_kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that JSON can hold, and the names of the others, such as a reward that is a function.

    A reader of real data is neither: it is where pictures lie on this machine, not what the agent is.
    """
    kept, others = {}, []
    for name, value in env_kwargs.items():
        value = value.item() if isinstance(value, np.generic) else value
        try:
            json.dumps(value)
            kept[name] = value
        except TypeError:
            others.append(name)
    return kept, [name for name in others if name != "source"]


def agents_folder(folder: str | os.PathLike[str], known: Collection[Path]) -> Path:
    """A folder to save an agent to: nothing of another agent that lies there is lost.

    Args:
        folder: needn't be there yet.
        known: whole paths of the folders that this agent was saved to or loaded from.

    Raises:
        ValueError, TypeError: if it is no folder, or holds another agent or other results.
    """
    path = check_out(folder, "agent")
    if (path / KINDS["agent"]).exists() and path.resolve() not in known:
        raise ValueError(
            f"out={str(folder)!r} holds another agent: choose another folder, or load that one and go on with it"
        )
    return path


def check_handed(needed: Collection[str], env_kwargs: Mapping[str, Any] | None) -> None:
    """That arguments which a file can't hold are there again."""
    for name in needed:
        if name not in (env_kwargs or {}):
            raise ValueError(
                f"{name} of its environment was an object, which isn't saved: load needs "
                f"env_kwargs={{{name!r}: ...}}"
            )


def why_unfit(env_kwargs: Mapping[str, Any] | None) -> str:
    """The likely cause why weights don't fit the agent of their settings, when these arguments were given."""
    if env_kwargs:
        return f"{' and '.join(env_kwargs)} given here may differ from what it was trained on"
    return "if another version of mmenvs saved it, it has to be trained again"


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with a checksum of the tensors in its metadata."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return serialise(whole, {**(metadata or {}), _CHECKSUM: _checksum(whole)})


def unpack(file: str | os.PathLike[str], device: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of :func:`pack`, on a device, and the metadata. Files of before there were checksums have none.

    Raises:
        ValueError: if the file is damaged.
    """
    try:
        with safe_open(file, "pt", device=device) as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{os.path.basename(file)} is damaged: {error}") from error
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(tensors):
        raise ValueError(
            f"{os.path.basename(file)} is damaged: its tensors don't have the checksum they were saved with"
        )
    return tensors, metadata


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    found = xxh3_64()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
