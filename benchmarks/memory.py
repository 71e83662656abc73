"""Resident memory over a long native run: it must be flat after warm-up.

pip install -e ".[benchmark]"
python benchmarks/memory.py --steps 10_000_000
"""

from __future__ import annotations

import argparse

import gymnasium as gym
import numpy as np
import psutil

import mmenvs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    process = psutil.Process()
    print("| id | steps | MB after 5 % | MB at the end | highest between |\n|---|---:|---:|---:|---:|")
    for id in mmenvs.SPECS:
        envs = gym.make_vec(id, num_envs=options.rows)
        envs.reset(seed=0)
        actions = np.random.default_rng(0).integers(envs.single_action_space.n, size=(64, options.rows))
        # The ten million are shared by the tasks.
        rounds = max(options.steps // options.rows // len(mmenvs.SPECS), 40)
        seen = []
        for t in range(rounds):
            envs.step(actions[t % 64])
            if t % (rounds // 20) == 0:
                seen.append(process.memory_info().rss / 2**20)
        print(f"| {id} | {rounds * options.rows:,} | {seen[1]:.1f} | {seen[-1]:.1f} | {max(seen[1:]):.1f} |")


if __name__ == "__main__":
    main()
