"""Keys of cached embeddings, and the table that finds the place of a key."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import int64, njit, uint64
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from mmenvs.world.random import mix

Keys = npt.NDArray[np.uint64]  # (n, 2)
Places = npt.NDArray[np.int64]  # (n,)


def hash_rows(rows: npt.NDArray[Any]) -> Keys:
    """xxh3-128 of the bytes of each row of an array ``(n, ...)``, as uint64 ``(n, 2)``."""
    array = np.ascontiguousarray(rows)
    if array.ndim < 2 or not array[:1].size:
        if array.ndim >= 2 and not len(array):
            return np.zeros((0, 2), np.uint64)
        raise ValueError(f"rows must have at least two axes and something in them, got shape {array.shape}")
    flat, width = array.reshape(-1).data.cast("B"), array[0].nbytes
    # Two statements a row is the floor of what Python costs here: the hash itself takes as long.
    digests = [xxh3_128_digest(flat[i : i + width]) for i in range(0, array.nbytes, width)]
    return np.frombuffer(bytearray().join(digests), np.uint64).reshape(-1, 2)


def pool_keys(pool: str, indices: npt.NDArray[np.int64]) -> Keys:
    """Keys of the items ``indices`` (n,) of the pool of that name, as uint64 ``(n, 2)``."""
    keys = np.empty((len(indices), 2), np.uint64)
    keys[:, 0] = indices
    keys[:, 1] = xxh3_64_intdigest(pool.encode())
    return keys


def checked(keys: Keys) -> Keys:
    """``keys`` if they are such, in one piece; else a ``TypeError``."""
    if not isinstance(keys, np.ndarray) or keys.dtype != np.uint64 or keys.ndim != 2 or keys.shape[1] != 2:
        shown = f"{keys.dtype} {keys.shape}" if isinstance(keys, np.ndarray) else type(keys).__name__
        raise TypeError(f"keys must be a uint64 array (n, 2) as of hash_rows or pool_keys, got {shown}")
    return np.ascontiguousarray(keys)


class Table:
    """The place of each key, a number from 0 to 2**63 - 2: an open-addressing hash table that grows by itself."""

    def __init__(self) -> None:
        # Key and place + 1; 0 is empty.
        self._rows = np.zeros((1024, 3), np.uint64)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def find(self, keys: Keys) -> Places:
        """Places of keys, int64 ``(n,)``; -1 for those that aren't there."""
        places = np.empty(len(keys), np.int64)
        _find(self._rows, keys, places)
        return places

    def insert(self, keys: Keys, first: int, packed: bool) -> npt.NDArray[np.bool_]:
        """Enter the keys that are new; which they are, bool ``(n,)``.

        Key i gets the place ``first + i``; ``packed`` leaves out the places of keys that aren't new.
        """
        while 2 * (self._used + len(keys)) > len(self._rows):
            grown = np.zeros((2 * len(self._rows), 3), np.uint64)
            _rehash(self._rows, grown)
            self._rows = grown
        fresh = np.empty(len(keys), np.bool_)
        self._used += _insert(self._rows, keys, first, packed, fresh)
        return fresh

    def clear(self) -> None:
        """Forget all keys."""
        self._rows[:] = 0
        self._used = 0


@njit(inline="always")
def _slot(table, k0, k1):
    """Where a key is in the table, or the empty place where it would be."""
    last = uint64(len(table) - 1)
    slot = mix(k0 ^ mix(k1)) & last
    while table[slot, 2] != uint64(0) and (table[slot, 0] != k0 or table[slot, 1] != k1):
        slot = (slot + uint64(1)) & last
    return slot


@njit(cache=True, nogil=True)
def _find(table, keys, places) -> None:
    for j in range(len(keys)):
        places[j] = int64(table[_slot(table, keys[j, 0], keys[j, 1]), 2]) - 1


@njit(cache=True, nogil=True)
def _insert(table, keys, first, packed, fresh) -> int:
    """Enter the keys that are new with places from ``first`` on; returns how many they are."""
    entered = 0
    for j in range(len(keys)):
        slot = _slot(table, keys[j, 0], keys[j, 1])
        fresh[j] = table[slot, 2] == uint64(0)
        if fresh[j]:
            table[slot, 0], table[slot, 1] = keys[j, 0], keys[j, 1]
            table[slot, 2] = uint64(first + (entered if packed else j) + 1)
            entered += 1
    return entered


@njit(cache=True, nogil=True)
def _rehash(table, grown) -> None:
    for i in range(len(table)):
        if table[i, 2] != uint64(0):
            grown[_slot(grown, table[i, 0], table[i, 1])] = table[i]
