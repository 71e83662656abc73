"""The cache of embeddings and the embedding wrapper, each beside the plainest thing that moves the same numbers.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/cache.py

Everything runs on one thread, the contestants take turns in short bursts, and medians are reported: on a shared
machine only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import statistics
import tempfile
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import torch
from xxhash import xxh3_128_digest

from mmenvs.embeddings import EmbeddingCache, load_embedding
from mmenvs.embeddings.keys import hash_rows, pool_keys
from mmenvs.wrappers import VectorEmbedObservation

ROWS, DIM, ITEMS = 1024, 256, 100_000
BATCHES = (16, 32, 64, 128, 256, 512, 1024)
Contestant = Callable[[], object]


def cache_contestants(folder: str) -> dict[str, Contestant]:
    generator = np.random.default_rng(0)
    values = generator.random((ITEMS, DIM), np.float32)
    batches = [generator.integers(0, ITEMS, ROWS) for _ in range(16)]
    pictures = generator.integers(0, 256, (ROWS, 64, 64, 3), dtype=np.uint8)
    turn = [0]

    def batch() -> np.ndarray:
        turn[0] += 1
        return batches[turn[0] % 16]

    def digest() -> None:
        flat, size = pictures.reshape(-1).data, pictures[0].nbytes
        for i in range(0, len(flat), size):
            xxh3_128_digest(flat[i : i + size])

    contestants: dict[str, Contestant] = {
        "np.take from one array": lambda: np.take(values, batch(), 0),
        "xxh3-128 over 64x64x3 pictures": digest,
    }
    for place, where in (("memory", None), ("disk", folder)):
        writer = EmbeddingCache(where)
        for begin in range(0, ITEMS, 10_000):
            rows = np.arange(begin, begin + 10_000)
            writer.section("0" * 32, DIM).store(pool_keys("pool", rows), values[rows])
        writer.section("1" * 32, DIM).store(hash_rows(pictures), values[:ROWS])
        cache = writer if where is None else EmbeddingCache(where)
        pool, content = cache.section("0" * 32, DIM), cache.section("1" * 32, DIM)
        assert (pool.lookup(pool_keys("pool", batches[0]))[0] == values[batches[0]]).all()
        assert content.lookup(hash_rows(pictures))[1].all()
        contestants[f"hit by pool index, {place}"] = lambda pool=pool: pool.lookup(pool_keys("pool", batch()))  # type: ignore[misc]
        contestants[f"hit by content, {place}"] = lambda content=content: content.lookup(hash_rows(pictures))  # type: ignore[misc]
    return contestants


def embedding_contestants(id: str) -> dict[str, Contestant]:
    """The wrapper less the environment it wraps, beside its encoders by themselves at several batch sizes."""
    envs = gym.make_vec(id, num_envs=ROWS)
    observation, _ = envs.reset(seed=0)
    embedding = load_embedding("shapes", envs.single_observation_space)

    @torch.no_grad()
    def bare(part: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [
            encoder(embedding.prepare(name, part[name])).flatten(1)
            for name, encoder in embedding.encoders.items()
        ]

    contestants: dict[str, Contestant] = {}
    for size in BATCHES:
        parts = [
            {name: torch.as_tensor(x[i : i + size]) for name, x in observation.items()}
            for i in range(0, ROWS, size)
        ]
        contestants[f"bare forward, batches of {size}"] = lambda parts=parts: [bare(part) for part in parts]  # type: ignore[misc]
    wrapped = VectorEmbedObservation(gym.make_vec(id, num_envs=ROWS), embedding)
    plain = gym.make_vec(id, num_envs=ROWS)
    actions = np.zeros(ROWS, np.int64)
    for each in (wrapped, plain):
        each.reset(seed=0)
    contestants["VectorEmbedObservation.step"] = lambda: wrapped.step(actions)
    contestants["step of the environment in it"] = lambda: plain.step(actions)
    return contestants


def seconds(contestants: dict[str, Contestant], bursts: int, repeats: int) -> dict[str, list[float]]:
    """Seconds a call of each contestant, burst by burst."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for call in contestants.values():
        call()
    for _ in range(bursts):
        for name, call in contestants.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                call()
            times[name].append((time.perf_counter() - begin) / repeats)
    return times


def ratio(times: dict[str, list[float]], base: str, name: str) -> float:
    return statistics.median(b / a for b, a in zip(times[base], times[name], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bursts", type=int, default=40, help="bursts of each contestant")
    parser.add_argument("--id", default="MMRL/VQA-v0", help="environment that is embedded")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = seconds(cache_contestants(folder), options.bursts, 10)
    index, content = list(times)[:2]
    print(f"{ROWS:,} rows of {DIM} float32 out of {ITEMS:,}\n")
    print("| | rows / s | of the plain one |\n|---|---:|---:|")
    for name, values in times.items():
        base = content if "content" in name else index
        shown = "" if name in (index, content) else f"{ratio(times, base, name):.2f}"
        print(f"| {name} | {ROWS / statistics.median(values):,.0f} | {shown} |")

    times = seconds(embedding_contestants(options.id), max(options.bursts // 8, 3), 1)
    step, inner = list(times)[-2:]
    # What the wrapper takes for itself is its step less that of the environment in it.
    times["VectorEmbedObservation"] = [a - b for a, b in zip(times.pop(step), times.pop(inner), strict=True)]
    best = min(list(times)[:-1], key=lambda name: statistics.median(times[name]))
    print(f"\n{options.id}, {ROWS:,} rows, 'shapes'\n\n| | observations / s | of the best |\n|---|---:|---:|")
    for name, values in times.items():
        print(f"| {name} | {ROWS / statistics.median(values):,.0f} | {ratio(times, best, name):.2f} |")


if __name__ == "__main__":
    main()
