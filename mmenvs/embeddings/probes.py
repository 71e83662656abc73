"""Probes: what an embedding keeps of the scenes and of the ties between modalities, on held-out data.

The measures themselves are in ``structure.py`` and can be called on any arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector.utils import create_empty_array
from torch import Tensor, nn

from mmenvs.checks import integer_in, one_of
from mmenvs.embeddings.modality_use import modality_use
from mmenvs.embeddings.structure import (
    alignment,
    cka,
    effective_rank,
    knn_probe,
    linear_probe,
    modality_gap,
    retrieval,
    uniformity,
)
from mmenvs.registry import task_class
from mmenvs.spaces import modality_of
from mmenvs.world.pairs import PairedScenes, keys_of
from mmenvs.world.scene import ATTRIBUTES, MAX_OBJECTS, N_VALUES, SPLITS, Scenes

__all__ = [
    "PAIRS", "alignment", "cka", "effective_rank", "knn_probe", "linear_probe", "modality_gap",
    "modality_use", "probe_report", "retrieval", "symbols_of", "uniformity",
]  # fmt: skip

Array = npt.NDArray[Any]
PAIRS = "pairs"  # in place of an environment's id: image, caption and audio of the same scenes
_BATCH = 256


class Encodes(Protocol):
    """What is probed: an embedding, or anything else with its ``encode``."""

    def encode(self, observation: dict[str, Tensor]) -> Mapping[str, Tensor]:
        """Raw observations ``{name: (B, ...)}`` to ``{name: (B, T, d)}``."""


class _Batch(NamedTuple):
    """Observations of some scenes, and what they show."""

    observation: dict[str, Array]
    texts: tuple[str, ...]  # names of the observations that are texts
    symbols: dict[str, Array]
    heard: Array | None  # (B,) which picture of a set is meant


class _Data(NamedTuple):
    """Encodings of n scenes, and what they show."""

    encoded: dict[str, Array]  # (n, d)
    tokens: dict[str, int]  # tokens that an encoding is the mean of
    texts: dict[str, Array]  # (n, L)
    symbols: dict[str, Array]  # (n, ...)


# ---------------------------------------------------------------------------------------------------------
# Symbols of scenes
# ---------------------------------------------------------------------------------------------------------


def has_scenes(task: Any) -> bool:
    """Whether a task shows scenes of the procedural world, which is what probes know the contents of."""
    return isinstance(getattr(task, "scenes", None), Scenes)


def symbols_of(task: Any, rows: npt.ArrayLike) -> dict[str, Array]:
    """What is in the scenes of some rows of a task of the world, or of :class:`PairedScenes`.

    Args:
        task: has ``scenes``; of the matching task, the scene that is heard is meant.
        rows: ``(n,)``.

    Returns:
        * ``shape``, ``colour``, ``size``, ``texture``: bool ``(n, values)``, whether any object has the value.
          These are the default targets of probes, since they ask for no order of the objects.
        * ``first_shape``, ...: int64 ``(n,)``, the attribute of the first object in reading order.
        * ``count``: int64 ``(n,)``, number of objects.
        * ``objects``: uint64 ``(n,)``, equal where the same objects follow each other in reading order.

    Raises:
        ValueError: the task has no scenes, as with a data set for its source.
    """
    if not has_scenes(task):
        raise ValueError(f"task must show scenes of the procedural world, {type(task).__name__} has none")
    rows = np.asarray(rows, np.int64)
    if hasattr(task, "target"):
        rows = rows * task.candidates + task.target[rows]
    scenes = Scenes(*(part[rows] for part in task.scenes))
    there = np.arange(MAX_OBJECTS) < scenes.count[:, None]  # (n, objects)
    symbols: dict[str, Array] = {}
    for a, name in enumerate(ATTRIBUTES):
        values = scenes.attributes[:, :, a, None] == np.arange(N_VALUES[a])  # (n, objects, values)
        symbols[name] = (values & there[:, :, None]).any(1)
        symbols[f"first_{name}"] = scenes.attributes[:, 0, a].astype(np.int64)
    return {**symbols, "count": scenes.count, "objects": keys_of(scenes)[1]}


# ---------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------


def probe_report(
    embedding: Encodes,
    id: str,
    *,
    split: str = "val",
    train_split: str = "train",
    difficulty: int = 0,
    n: int = 2048,
    seed: int = 0,
    pool: int = 256,
    env_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All probes of an embedding, per modality and per pair of modalities, ready for JSON.

    Observations are those at the end of the oracle's episodes, where growing texts are whole. Encodings are
    averaged over their tokens; of a set of pictures with as many tokens for each, the tokens of the one
    that is heard are taken, else all. Linear and k-NN probes are fitted on ``train_split``; all else is
    measured on ``split``. In retrieval the same objects in the same order, or, in a pair with a text, the
    same text, are right answers.

    Args:
        embedding: anything with ``encode``: raw ``{name: (B, ...)}`` tensors to ``{name: (B, T, d)}``. Names
            that it leaves out aren't probed. A torch module is called on its own device.
        id: environment of the world, or ``"pairs"``: ``image``, ``caption`` and ``audio`` of the same scenes
            (:class:`mmenvs.world.pairs.PairedScenes`).
        split, train_split, difficulty: as for the environments.
        n: rows of each of the two splits, at least ``pool``.
        pool: of retrieval.
        env_kwargs: further arguments of the environment or of ``PairedScenes``.

    Returns:
        ``{"modalities": {name: {"tokens", "width", "uniformity", "effective_rank", "cka_symbols",
        "probes": {symbol: {"linear", "knn", "majority"}}}}, "pairs": {"a-b": {"cka", "alignment",
        "modality_gap", "retrieval"}}, ...}`` and the arguments. ``majority`` is the accuracy of always saying
        what is most frequent. What cannot be measured is ``{"skipped": why}`` in its place.

    Raises:
        ValueError: wrong arguments; a non-finite or misshapen encoding.
    """
    one_of("split", split, SPLITS)
    one_of("train_split", train_split, SPLITS)
    integer_in("n", n, max(pool, 11), 10**7)
    integer_in("seed", seed, 0, 2**63)
    # Texts have an encode of their own.
    if isinstance(embedding, str) or not callable(getattr(embedding, "encode", None)):
        raise TypeError(
            "embedding must have an encode method, such as what load_embedding(name, observation_space) gives, "
            f"got {embedding!r}"
        )
    kwargs = {**(env_kwargs or {}), "difficulty": difficulty}
    train = _collect(embedding, _batches(id, seed, {**kwargs, "split": train_split}), n)
    test = _collect(embedding, _batches(id, seed, {**kwargs, "split": split}), n)
    symbols = np.concatenate(
        [*(test.symbols[name] for name in ATTRIBUTES), np.eye(MAX_OBJECTS + 1)[test.symbols["count"]]], 1
    )
    modalities = {
        name: {
            "tokens": test.tokens[name],
            "width": x.shape[1],
            "uniformity": uniformity(x),
            "effective_rank": effective_rank(x),
            "cka_symbols": cka(x, symbols),
            "probes": {
                symbol: _probe(train.encoded[name], train.symbols[symbol], x, test.symbols[symbol])
                for symbol in test.symbols
                if symbol != "objects"
            },
        }
        for name, x in test.encoded.items()
    }
    pairs = {f"{a}-{b}": _pair_report(test, a, b, pool) for a, b in combinations(test.encoded, 2)}
    return {
        "id": id, "split": split, "train_split": train_split, "difficulty": difficulty, "n": n, "seed": seed,
        "modalities": modalities, "pairs": pairs,
    }  # fmt: skip


def _probe(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> dict[str, Any]:
    """Both probes of one symbol, over the columns of a yes-no symbol that vary."""
    if train_y.ndim == 2:
        vary = train_y.any(0) & ~train_y.all(0)
        train_y, test_y = train_y[:, vary], test_y[:, vary]
        usual = train_y.mean(0) > 0.5
    else:
        usual = np.bincount(train_y).argmax()
    if train_y.size == 0 or (train_y == train_y[0]).all():
        return {"skipped": "it is the same in all rows"}
    return {
        "linear": linear_probe(train_x, train_y, test_x, test_y),
        "knn": knn_probe(train_x, train_y, test_x, test_y),
        "majority": float((test_y == usual).mean()),
    }


def _pair_report(data: _Data, a: str, b: str, pool: int) -> dict[str, Any]:
    x, y = data.encoded[a], data.encoded[b]
    report: dict[str, Any] = {"cka": cka(x, y)}
    if x.shape[1] != y.shape[1]:
        why = {"skipped": f"{a} has width {x.shape[1]} and {b} has width {y.shape[1]}"}
        return report | {"alignment": why, "modality_gap": why, "retrieval": why}
    told = [data.texts[name] for name in (a, b) if name in data.texts]
    groups = (
        np.unique(np.concatenate(told, 1), axis=0, return_inverse=True)[1].reshape(-1)
        if told
        else data.symbols["objects"]
    )
    return report | {
        "alignment": alignment(x, y),
        "modality_gap": modality_gap(x, y),
        "retrieval": retrieval(x, y, pool=pool, groups=groups),
    }


# ---------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------


def _batches(id: str, seed: int, kwargs: dict[str, Any]) -> Iterator[_Batch]:
    """Batches of ``_BATCH`` fresh scenes, without an end."""
    rows = np.arange(_BATCH)
    if id == PAIRS:
        scenes = PairedScenes(_BATCH, seed=seed, **kwargs)
        texts = _texts(scenes.observation_space.spaces)
        while True:
            everything = scenes.next()
            observation = {name: everything[name] for name in scenes.observation_space.spaces}
            yield _Batch(observation, texts, symbols_of(scenes, rows), None)
    task_class(id)
    envs: Any = gym.make_vec(id, num_envs=_BATCH, **kwargs).unwrapped
    task = envs.task
    while True:
        envs.reset(seed=seed)
        seed += _BATCH
        # The environment would begin new episodes by itself, the task doesn't.
        live = rows
        while live.size:
            live = live[~task.step(live, task.oracle(live))[1]]
        ended: Any = create_empty_array(task.observation_space, _BATCH)
        task.observe(rows, ended)
        heard = task.target.copy() if hasattr(task, "target") else None
        yield _Batch(ended, _texts(task.observation_space.spaces), symbols_of(task, rows), heard)


def _texts(parts: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, part in parts.items() if modality_of(part) == "text")


def _collect(embedding: Encodes, batches: Iterator[_Batch], n: int) -> _Data:
    device = torch.device("cpu")
    if isinstance(embedding, nn.Module):
        device = next((parameter.device for parameter in embedding.parameters()), device)
    encoded: dict[str, list[Array]] = {}
    texts: dict[str, list[Array]] = {}
    symbols: dict[str, list[Array]] = {}
    tokens: dict[str, int] = {}
    for batch in islice(batches, -(-n // _BATCH)):
        given = {name: torch.as_tensor(x).to(device) for name, x in batch.observation.items()}
        with torch.no_grad():
            result = embedding.encode(given)
        if not isinstance(result, Mapping) or not result:
            raise TypeError(
                "embedding.encode must return {name: (B, T, d)}, got "
                f"{type(result).__name__}; load_embedding makes an embedding of an Extractor"
            )
        for name, x in result.items():
            pooled, tokens[name] = _pooled(name, x, batch)
            encoded.setdefault(name, []).append(pooled)
        for name in batch.texts:
            texts.setdefault(name, []).append(batch.observation[name].copy())
        for name, values in batch.symbols.items():
            symbols.setdefault(name, []).append(values)

    def joined(lists: dict[str, list[Array]]) -> dict[str, Array]:
        return {name: np.concatenate(parts)[:n] for name, parts in lists.items()}

    return _Data(joined(encoded), tokens, joined(texts), joined(symbols))


def _pooled(name: str, x: Tensor, batch: _Batch) -> tuple[Array, int]:
    """The mean of an encoding's tokens, ``(B, d)``, and of how many it was."""
    if not isinstance(x, Tensor) or x.dim() != 3 or len(x) != _BATCH:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"the encoding of {name!r} must be a tensor ({_BATCH}, T, d), got {shape}")
    if not torch.isfinite(x).all():
        raise ValueError(f"the encoding of {name!r} must be finite, the embedding gave NaN or infinity")
    part = batch.observation.get(name)
    # A set of pictures: (B, K, H, W, 3).
    if batch.heard is not None and part is not None and part.ndim == 5 and x.shape[1] % part.shape[1] == 0:
        of_each = x.unflatten(1, (part.shape[1], -1))
        x = of_each[torch.arange(_BATCH), torch.as_tensor(batch.heard, device=x.device)]
    return x.float().mean(1).cpu().numpy(), x.shape[1]
