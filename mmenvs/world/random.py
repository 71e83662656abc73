"""Counter-based random streams that compiled kernels draw from, one per row.

A stream is one uint64; every draw adds a constant and mixes it (SplitMix64: Steele, Lea and Flood 2014,
"Fast splittable pseudorandom number generators"). Its start is a hash of (split, seed, episode), so
neighbouring seeds share nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from mmenvs.world.kernels import inlined, kernel

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


@inlined
def mix(z):
    """Scramble a uint64: every input bit reaches every output bit."""
    z = uint64(z)
    z = (z ^ (z >> uint64(30))) * _M1
    z = (z ^ (z >> uint64(27))) * _M2
    return z ^ (z >> uint64(31))


@inlined
def hash2(a, b):
    """One uint64 out of two; the order matters."""
    return mix(mix(uint64(a) + _GAMMA) ^ (uint64(b) * _M1 + _GAMMA))


@inlined
def draw(streams, i):
    """The next uint64 of stream ``i``."""
    streams[i] = streams[i] + _GAMMA
    return mix(streams[i])


@inlined
def uniform(streams, i):
    """A float64 in [0, 1)."""
    return float(draw(streams, i) >> uint64(11)) * (1.0 / 9007199254740992.0)


@inlined
def below(streams, i, n):
    """An integer in [0, n), n below 2**31."""
    return np.int64(((draw(streams, i) >> uint64(32)) * uint64(n)) >> uint64(32))


@njit(cache=True, nogil=True)
def words(count: int, key: int) -> npt.NDArray[np.uint64]:
    """``count`` draws from the stream that starts at ``key``."""
    stream = np.full(1, uint64(key))
    out = np.empty(count, np.uint64)
    for k in range(count):
        out[k] = draw(stream, 0)
    return out


@kernel
def start(
    streams: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.int64],
    split: int,
    seeds: npt.NDArray[np.uint64],
    episodes: npt.NDArray[np.int64],
) -> None:
    """Set the streams of ``rows`` to the start of their episode's stream."""
    for j in range(rows.size):
        i = rows[j]
        streams[i] = hash2(hash2(hash2(uint64(split), seeds[i]), uint64(episodes[i])), uint64(1))


@kernel
def start_pool(
    streams: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64], split: int, indices: npt.NDArray[np.int64]
) -> None:
    """Set the streams of ``rows`` to the start of item ``indices[i]`` of the split's pool."""
    for j in range(rows.size):
        i = rows[j]
        streams[i] = hash2(hash2(uint64(split), uint64(indices[i])), uint64(2))


@kernel
def below_rows(
    streams: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64], n: int, out: npt.NDArray[np.int64]
) -> None:
    """Draw an integer in [0, n) for each of ``rows`` from its stream, into ``out[rows]``."""
    for j in range(rows.size):
        out[rows[j]] = below(streams, rows[j], n)


@kernel
def choose_rows(
    streams: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.int64],
    pool: npt.NDArray[np.int64],
    out: npt.NDArray[np.int64],
) -> None:
    """Draw an element of ``pool`` for each of ``rows`` from its stream, into ``out[rows]``."""
    for j in range(rows.size):
        out[rows[j]] = pool[below(streams, rows[j], pool.size)]
