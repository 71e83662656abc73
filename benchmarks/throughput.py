"""Steps per second of the native vector environments, beside a plain copy of their pictures and beside others.

    pip install -e ".[benchmark]"            # Minigrid and EnvPool, to compare with
    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/throughput.py

Everything runs on one thread, the contestants take turns in short bursts, and medians over the bursts are
reported: on a shared machine only ratios within one run mean anything. EnvPool's Procgen needs Qt 5
(Debian: ``apt install libqt5core5a libqt5gui5``); a contestant that is not installed is left out, and said so.
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import platform
import statistics
import time
from collections.abc import Callable

import gymnasium as gym
import numpy as np

import mmenvs

ROWS = 1024


def stepper(envs: gym.vector.VectorEnv, read: bool = False) -> tuple[Callable[[], object], int]:
    """A function that steps with random actions, and the rows it steps; ``read`` looks at each ``final_obs``."""
    envs.reset(seed=0)
    generator = np.random.default_rng(0)
    actions = [generator.integers(envs.single_action_space.n, size=envs.num_envs) for _ in range(16)]
    held: list[object] = [None, 0]

    def step() -> None:
        # The last result stays alive during the step, as in a training loop.
        held[0] = envs.step(actions[held[1] % 16])
        held[1] += 1
        if read:
            held[0][-1]["final_obs"]

    return step, envs.num_envs


def copier(rows: int, size: int) -> tuple[Callable[[], object], int]:
    source = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
    target = np.empty_like(source)
    return lambda: np.copyto(target, source), rows


def minigrid(rows: int) -> tuple[Callable[[], object], int]:
    from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper

    def make() -> gym.Env:
        return ImgObsWrapper(RGBImgObsWrapper(gym.make("MiniGrid-Empty-8x8-v0")))

    return stepper(gym.vector.SyncVectorEnv([make] * rows))


def procgen(rows: int) -> tuple[Callable[[], object], int]:
    import envpool

    envs = envpool.make("CoinrunEasy-v0", env_type="gymnasium", num_envs=rows, num_threads=1)
    envs.reset()
    actions = np.random.default_rng(0).integers(0, 15, rows).astype(np.int32)
    return lambda: envs.step(actions), rows


def native(id: str, rows: int, **kwargs: object) -> tuple[Callable[[], object], int]:
    return stepper(gym.make_vec(id, num_envs=rows, **kwargs))


def sync(id: str, rows: int) -> tuple[Callable[[], object], int]:
    same_step = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    return stepper(gym.make_vec(id, num_envs=rows, vectorization_mode="sync", vector_kwargs=same_step))


CONTESTANTS: dict[str, Callable[[], tuple[Callable[[], object], int]]] = {
    "np.copyto of the pictures, 1,024 rows of 64x64x3": lambda: copier(ROWS, 64),
    "VQA-v0 native, 1,024 rows": lambda: native("MMRL/VQA-v0", ROWS),
    "VQA-v0 native, 1,024 rows, final_obs read each step": lambda: stepper(
        gym.make_vec("MMRL/VQA-v0", num_envs=ROWS), read=True
    ),
    "VQA-v0 native, 1,024 rows, difficulty 1": lambda: native("MMRL/VQA-v0", ROWS, difficulty=1),
    "VQA-v0 native, 1,024 rows, difficulty 3": lambda: native("MMRL/VQA-v0", ROWS, difficulty=3),
    "VQA-v0 native, 1,024 rows, 224 pixels": lambda: native("MMRL/VQA-v0", ROWS, image_size=224),
    "VQA-v0 in SyncVectorEnv, 64 rows": lambda: sync("MMRL/VQA-v0", 64),
    "Minigrid RGB (64x64x3) in SyncVectorEnv, 16 rows": lambda: minigrid(16),
    "EnvPool Procgen Coinrun (64x64x3), 1,024 rows": lambda: procgen(ROWS),
    "AudioVisualMatching-v0 native, 256 rows (4 pictures, 1 s)": lambda: native(
        "MMRL/AudioVisualMatching-v0", 256
    ),
    "Captioning-v0 native, 256 rows": lambda: native("MMRL/Captioning-v0", 256),
}
BASE, OURS = list(CONTESTANTS)[:2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--bursts", type=int, default=30, help="bursts of each contestant")
    parser.add_argument("--seconds", type=float, default=0.15, help="length of a burst")
    options = parser.parse_args()

    runners = {}
    for name, make in CONTESTANTS.items():
        try:
            runners[name] = make()
        except ImportError as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}")
    for step, _ in runners.values():
        for _ in range(3):
            step()
    rates: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(options.bursts):
        for name, (step, rows) in runners.items():
            begin, steps = time.perf_counter(), 0
            while time.perf_counter() - begin < options.seconds:
                step()
                steps += 1
            rates[name].append(rows * steps / (time.perf_counter() - begin))

    median = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
    )
    print(f"numpy {np.__version__}, gymnasium {gym.__version__}, mmenvs {mmenvs.__version__}; one thread\n")
    print("| | observations / s | of np.copyto | VQA native is |\n|---|---:|---:|---:|")
    for name, rate in median.items():
        paired = statistics.median(a / b for a, b in zip(rates[name], rates[BASE], strict=True))
        times = statistics.median(a / b for a, b in zip(rates[OURS], rates[name], strict=True))
        print(f"| {name} | {rate:,.0f} | {paired:.2f} | {times:,.1f}x |")


if __name__ == "__main__":
    main()
