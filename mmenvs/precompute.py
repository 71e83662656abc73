"""Embedding all that an environment can show, before an agent trains on it: what ``mmenvs embed`` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmenvs.embeddings.keys import Keys, hash_rows, pool_keys
from mmenvs.embeddings.shards import record_bytes
from mmenvs.tasks.base import Rows, Task
from mmenvs.wrappers import Encoded, Encoder, pool_names, room

POOL_SIZE = 50_000  # of ``mmenvs embed`` where neither a size nor a source is given


@dataclass(frozen=True)
class Part:
    """What there is to embed of one observation.

    Attributes:
        name: of the observation.
        items: int64 ``(m,)``, items of the task's pool or source, each different content once.
        keys: uint64 ``(m, 2)``, theirs in the cache: of the pool's index, or of the content with a source.
    """

    name: str
    items: Rows
    keys: Keys

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, chosen: slice | npt.NDArray[np.bool_]) -> Part:
        return Part(self.name, self.items[chosen], self.keys[chosen])


# Embeds slices of parts, in whatever order: from task, encoder and slices to each slice with its encodings.
Engine = Callable[[Task, Encoder, Iterator[Part]], Iterator[tuple[Part, Encoded]]]


def parts_of(task: Task, encoder: Encoder) -> list[Part]:
    """All there is to embed of a task: the observations that are fixed in an episode, of every item.

    With a source it reads and hashes every item, as many share a picture or a question.

    Args:
        task: with ``pool_size`` or a source; its rows are used up.
        encoder: of the task's observations, with a cache.

    Raises:
        ValueError: if task or encoder lack pool and source or cache, if no observation is fixed, or if the
            cache's budget is too small.
    """
    count = task.count_items()
    if count is None or encoder.cache is None:
        raise ValueError("parts_of needs a task with pool_size or a source, and an encoder with a cache")
    names = [name for name in encoder.names if name in task.fixed]
    if not names:
        raise ValueError(
            f"no observation of {type(task).__name__} is fixed in an episode: there is nothing to embed before"
        )
    items = np.arange(count)
    if task.pool is None:
        # Before the keys, which may be many.
        _check_budget(count * sum(record_bytes(_size(encoder, name)) for name in names), names, encoder)
        pools = pool_names(task)
        return [Part(name, items, pool_keys(pools[name], items)) for name in names]
    hashed: dict[str, list[Keys]] = {name: [] for name in names}
    out = {name: array for name, array in room(task).items() if name in names}
    for first in range(0, len(items), task.num_envs):
        chosen = items[first : first + task.num_envs]
        rows = np.arange(len(chosen))
        task.start_items(rows, chosen)
        task.observe(rows, out)
        for name in names:
            hashed[name].append(hash_rows(out[name][rows]))
    parts = []
    for name in names:
        keys = np.concatenate(hashed[name])
        firsts = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        parts.append(Part(name, items[firsts], keys[firsts]))
    _check_budget(cache_bytes(parts, encoder), names, encoder)
    return parts


def cache_bytes(parts: Sequence[Part], encoder: Encoder) -> int:
    """Bytes that the embeddings of all parts take in a cache."""
    return sum(len(part) * record_bytes(_size(encoder, part.name)) for part in parts)


def embed_parts(
    task: Task, encoder: Encoder, parts: Sequence[Part], engine: Engine | None = None, size: int = 256
) -> Iterator[int]:
    """Bring the embeddings of all parts into the encoder's cache; what is there already isn't computed again.

    Args:
        task, encoder, parts: as for :func:`parts_of`.
        engine: who embeds; None does it here.
        size: most items of a slice, what is lost at most if the work is killed.

    Returns:
        How many are done, of all parts together, after each slice.

    Raises:
        OSError: if the cache's folder can't be written any more; what was written stays.
    """
    done = 0
    folder = encoder.cache and encoder.cache.folder
    sections: dict[str, Any] = {part.name: encoder.section(part.name) for part in parts}

    def lacking() -> Iterator[Part]:
        nonlocal done
        for part in parts:
            for first in range(0, len(part), size):
                piece = part[first : first + size]
                missing = ~sections[part.name].lookup(piece.keys)[1]
                done += len(piece) - int(missing.sum())
                if missing.any():
                    yield piece[missing]

    for part, encoded in (engine or _here)(task, encoder, lacking()):
        sections[part.name].store(part.keys, encoded)
        if encoder.cache and encoder.cache.folder != folder:
            raise OSError(
                f"the cache {str(folder)!r} is full; what is in it stays, and the same work goes on there"
            )
        done += len(part)
        yield done
    yield done


def _here(task: Task, encoder: Encoder, slices: Iterator[Part]) -> Iterator[tuple[Part, Encoded]]:
    for part in slices:
        yield part, encode_items(task, encoder, part)


def encode_items(task: Task, encoder: Encoder, part: Part, check: bool = False) -> Encoded:
    """Encodings ``(m, T * d)`` float32 of a part.

    Args:
        task, encoder: as for :func:`parts_of`; a cache isn't asked.
        part: which.
        check: compare the keys with what is seen here, in case the part was made on another machine.

    Raises:
        ValueError: if they differ.
    """
    out = {part.name: room(task)[part.name]}
    encoded = []
    pool = pool_names(task)[part.name] if check and task.pool is None else ""
    for first in range(0, len(part), task.num_envs):
        piece = part[first : first + task.num_envs]
        rows = np.arange(len(piece))
        task.start_items(rows, piece.items)
        task.observe(rows, out)
        seen = out[part.name][rows]
        if check:
            keys = hash_rows(seen) if task.pool is not None else pool_keys(pool, piece.items)
            if (keys != piece.keys).any():
                raise ValueError(f"the same items show another {part.name} here")
        encoded.append(encoder.forward(part.name, seen))
    return np.concatenate(encoded)


def _size(encoder: Encoder, name: str) -> int:
    length, d = encoder.embedding.dims[name]
    return length * d


def _check_budget(needed: int, names: Sequence[str], encoder: Encoder) -> None:
    cache = encoder.cache
    # Shards that are being written count as full.
    if cache is not None and needed + len(names) * cache.shard_bytes > cache.budget:
        raise ValueError(
            f"budget_mb={cache.budget // 2**20} is too small for what there is to embed, which takes "
            f"{needed / 2**20:.0f} MB and room to write"
        )
