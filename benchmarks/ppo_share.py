"""The share of PPO's wall time that the environment and its adapter take, with the default recipe.

OMP_NUM_THREADS=1 python benchmarks/ppo_share.py --steps 40_000
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import time
from typing import Any

from mmenvs_agents.sb3 import make_agent, train

import mmenvs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40_000)
    options = parser.parse_args()
    print("| id | environment + adapter | all | share |\n|---|---:|---:|---:|")
    for id in mmenvs.SPECS:
        agent = make_agent("ppo", id, encoders={})
        # Timed inside SB3's own wrapper chain, so that its picture transposition isn't ours but the adapter is.
        inner: Any = agent.get_env().unwrapped
        spent, step_wait = 0.0, inner.step_wait

        def timed(step_wait: Any = step_wait) -> Any:
            nonlocal spent
            begin = time.perf_counter()
            result = step_wait()
            spent += time.perf_counter() - begin
            return result

        inner.step_wait = timed
        begin = time.perf_counter()
        train(agent, options.steps, progress=False)
        total = time.perf_counter() - begin
        print(f"| {id} | {spent:.1f} s | {total:.1f} s | {spent / total:.1%} |")


if __name__ == "__main__":
    main()
