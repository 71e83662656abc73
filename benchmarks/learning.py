"""Train PPO on the tasks and score it on the test split, beside random, blind and oracle.

Settings are those of the default recipe; cross_attention on VQA alone has minibatches of 512 in place of 256. The runs
named ``minibatch-...`` compare these after fewer steps, scored on the val split, so that no test score chose them.

    OMP_NUM_THREADS=1 python benchmarks/learning.py --out docs/results          # all runs, one after the other
    OMP_NUM_THREADS=1 python benchmarks/learning.py --only vqa-concat           # one of them
    python benchmarks/learning.py --table                                       # the table of what is done

Each run appends one row to ``learning.jsonl`` in the folder: settings, scores, cost, versions, commit.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stable_baselines3
import torch
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.sb3 import make_agent, train

import mmenvs

MISSION = ("concat", "weighted_sum", "cross_attention", "transformer")
VQA, MATCHING, CAPTIONING = "MMRL/VQA-v0", "MMRL/AudioVisualMatching-v0", "MMRL/Captioning-v0"


@dataclass(frozen=True)
class Run:
    """One training and its evaluation on ``split``; no steps means a baseline that doesn't learn."""

    id: str
    difficulty: int
    agent: str
    steps: int = 0
    arguments: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)  # arguments of the environment in training alone
    split: str = "test"


RUNS: dict[str, Run] = {}
for _short, _id, _difficulty in (("vqa", VQA, 1), ("matching", MATCHING, 0), ("captioning", CAPTIONING, 0)):
    for _name in ("random", "most_frequent", "oracle"):
        RUNS[f"{_short}-{_name}"] = Run(_id, _difficulty, _name)
_SHAPES = {"image": "shapes", "question": "shapes"}
# What an hour of a core at most is enough for.
_LONG = {"concat": 1_000_000, "weighted_sum": 4_000_000, "cross_attention": 1_800_000, "transformer": 600_000}
_MORE: dict[str, dict[str, Any]] = {"cross_attention": {"batch_size": 512}}
for _fusion in MISSION:
    RUNS[f"matching-{_fusion}"] = Run(MATCHING, 0, "ppo", 70_000, {"fusion": _fusion})
    _heard = {"audio": "shapes", "images": "shapes"}
    RUNS[f"matching-shapes-{_fusion}"] = Run(
        MATCHING, 0, "ppo", 70_000, {"fusion": _fusion, "encoders": _heard}
    )
    # From pixels level 1 takes too long for a CPU; so the pretrained embedding that ships sees and reads.
    RUNS[f"vqa-shapes-{_fusion}"] = Run(
        VQA, 1, "ppo", _LONG[_fusion], {"fusion": _fusion, "encoders": _SHAPES, **_MORE.get(_fusion, {})}
    )
    for _size in (256, 512):
        RUNS[f"minibatch-{_size}-{_fusion}"] = Run(
            VQA, 1, "ppo", 200_000, {"fusion": _fusion, "encoders": _SHAPES, "batch_size": _size}, split="val"
        )
RUNS["vqa-concat"] = Run(VQA, 1, "ppo", 400_000, {"fusion": "concat"})
_SEEN = {"fusion": "concat", "encoders": {"image": "shapes"}}
RUNS["captioning-concat"] = Run(CAPTIONING, 0, "ppo", 300_000, _SEEN, {"shaping": True})
for _seen in ("question", "image"):
    RUNS[f"vqa-{_seen}-only"] = Run(VQA, 1, "ppo", 50_000, {"fusion": "concat", "visible": (_seen,)})
for _seen in ("audio", "images"):
    RUNS[f"matching-{_seen}-only"] = Run(
        MATCHING, 0, "ppo", 20_000, {"fusion": "concat", "visible": (_seen,)}
    )
RUNS["captioning-caption-only"] = Run(
    CAPTIONING, 0, "ppo", 100_000, {"fusion": "concat", "visible": ("caption",)}, {"shaping": True}
)


def execute(name: str, run: Run, episodes: int, steps: int | None, keep: Path | None) -> dict[str, Any]:
    """Train and score one run; a row of the table."""
    env_kwargs = {"difficulty": run.difficulty}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    begin, cpu = time.perf_counter(), time.process_time()
    player: Any = run.agent
    total = run.steps and (steps or run.steps)
    if run.steps:
        kwargs = {**env_kwargs, **run.training}
        arguments = {"encoders": {}, **run.arguments}
        player = make_agent(run.agent, run.id, env_kwargs=kwargs, seed=0, device="cpu", **arguments)
        train(player, total, keep and keep / name, progress=False)
    trained, trained_cpu = time.perf_counter() - begin, time.process_time() - cpu
    result = evaluate(player, run.id, split=run.split, episodes=episodes, env_kwargs=env_kwargs)
    return {
        "name": name,
        "id": run.id,
        "difficulty": run.difficulty,
        "split": run.split,
        "agent": run.agent,
        **run.arguments,
        **run.training,
        "steps": total,
        "score": result.mean_return,
        "low": result.return_low,
        "high": result.return_high,
        "success": result.success.value,
        "by_type": {kind: rate.value for kind, rate in result.by_type.items()},
        "episodes": episodes,
        "train_seconds": round(trained, 1),
        "train_cpu_seconds": round(trained_cpu, 1),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "mmenvs": mmenvs.__version__,
            "torch": torch.__version__,
            "stable_baselines3": stable_baselines3.__version__,
        },
        "commit": commit.stdout.strip(),
    }


def table(path: Path) -> str:
    """The newest row of each run as Markdown tables, one of the test and one of the val split."""
    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    return "\n\n".join(_table(rows, split) for split in ("test", "val"))


def _table(rows: dict[str, dict[str, Any]], split: str) -> str:
    lines = [
        f"| id | difficulty | agent | steps | {split} score | 95 % interval | minutes of one core |",
        "|---|---:|---|---:|---:|---|---:|",
    ]
    for name, run in RUNS.items():
        if name in rows and run.split == split:
            row = rows[name]
            agent = row["agent"].replace("_", " ")
            if row["steps"]:
                only = row.get("visible")
                agent = f"PPO, {only[0]} only" if only else f"PPO, {row['fusion']}"
                if row.get("encoders"):
                    agent += f", {next(iter(row['encoders'].values()))}"
                if "batch_size" in row:
                    agent += f", minibatches of {row['batch_size']}"
            lines.append(
                f"| {row['id']} | {row['difficulty']} | {agent} | {row['steps']:,} | {row['score']:.3f} "
                f"| {row['low']:.3f} to {row['high']:.3f} | {row['train_cpu_seconds'] / 60:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--steps", type=int, help="in place of each run's own budget")
    parser.add_argument("--keep", type=Path, help="folder for the agents, their logs and checkpoints")
    parser.add_argument("--table", action="store_true", help="print the table and do nothing else")
    options = parser.parse_args()
    path = options.out / "learning.jsonl"
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        for name in options.only:
            row = execute(name, RUNS[name], options.episodes, options.steps, options.keep)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}: {row['score']:.3f}", flush=True)
    print(table(path))


if __name__ == "__main__":
    main()
