"""Runs of the benchmark that take an instant, for the tests of what goes wrong; also a runner to kill.

python -m tests.bench_runs FOLDER [--resume]
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mmenvs.benchmark.plan import Plan

KILLS = int(os.environ.get("MMENVS_KILLS", "3"))
PLAN = Plan("core-v0", ("ppo", "a2c", "dqn"), seeds=KILLS + 1, steps=100, episodes=8, device="cpu")


def execute(run, device, tell):
    """Rows with numbers that depend on the run alone; agents of some names misbehave."""
    match run["agent"]:
        case "raises":
            raise ArithmeticError("no\nanswer")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exits":
            sys.exit("no weights")
        case "interrupts":
            raise KeyboardInterrupt("enough")
        case "leaves":
            os._exit(3)
        case "hangs":
            time.sleep(60)
        case "tells":
            tell(0.25, 0.5)
        case "tells and hangs":
            tell(0.25, 0.5)
            time.sleep(60)
    time.sleep(0.02)
    return rows_of(run)


def rows_of(run, good=None):
    """Rows of a finished run; ``good`` is its skill, None draws one."""
    digest = hashlib.sha256(repr(sorted(run.items(), key=str)).encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    skill = {"oracle": 1.0, "random": 0.05, "most_frequent": 0.25}.get(run["agent"], good)
    skill = generator.uniform(0.3, 0.9) if skill is None else skill
    rows = []
    for share in (*run["checkpoints"], 1.0) if run["steps"] else (1.0,):
        returns = (generator.random(run["episodes"]) < skill * (0.4 + 0.6 * share)).astype(int).tolist()
        if run["agent"] == "oracle":
            returns = [1] * run["episodes"]
        mean = float(np.mean(returns))
        score = {"return": mean, "success": mean, "length": 1, "by_type": {"count": mean, "exist": mean / 2}}
        row = {
            "run": run,
            "step": round(run["steps"] * share),
            "final": share == 1.0,
            "scores": {"test/greedy": score},
        }
        if share == 1.0:
            whole = {**score, "returns": returns}
            row["scores"] = {"test/greedy": whole, "compositional/greedy": whole, "test/sampled": score}
            if run["steps"]:
                row["scores"]["test/greedy/without image"] = score
            row["cost"] = {
                "seconds": 60.0 * run["steps"],
                "cpu_seconds": 50.0,
                "parameters": 1000,
                "decisions_per_second": 900.5,
            }
            row["examples"] = [{"seed": i, "actions": [i % 4]} for i in range(8)]
        rows.append(row)
    return rows


def main(folder: str, resume: bool) -> None:
    from mmenvs.benchmark import job, runner

    job.execute = execute
    runner.benchmark(PLAN, Path(folder), resume=resume)


if __name__ == "__main__":
    main(sys.argv[1], "--resume" in sys.argv)
