"""Reinforcement learning on top of supervised learning: captions at difficulty 1, every algorithm, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/captioning.py --out docs/results      # all that isn't there yet, an hour or more
    OMP_NUM_THREADS=1 python benchmarks/captioning.py --only rloo --seeds 1   # one algorithm, one seed
    python benchmarks/captioning.py --table                                   # the tables of what is done

A policy clones the oracle for 100,000 steps, then each algorithm goes on from it with the same budget (three or four
times as much where ``RUNS`` says so), and all are scored greedily on the same 2,000 episodes of the test split. Each
run appends one row to ``captioning.jsonl``.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import math
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.restraints import Restraints
from mmenvs_agents.transformer.rollout import collect

import mmenvs  # noqa: F401

ID, LEVEL = "MMRL/Captioning-v0", {"difficulty": 1}
BASE, BASE_STEPS = "supervised", 100_000
# The pretrained embedding that ships sees; so what is learned here is what to say.
ENCODERS = {"image": "shapes"}
PARTS = ("scene_f1", "cider", "hallucination", "repetition", "length")
EPISODES, ROWS = 2000, 500
# Of Student, 97.5 %, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


@dataclass(frozen=True)
class Run:
    """One algorithm on top of the base."""

    method: str
    times: int = 1  # the budget of steps
    restraints: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=lambda: {"reward": {"scene_f1": 1.0, "cider": 0.1}})


RUNS = {name: Run(name) for name in ("grpo", "dr_grpo", "dapo", "rloo", "scst", "reinforce", "dpo")}
RUNS["longer"] = Run("reinforce", times=3)
# A fast multiplier overshoots further and is back sooner: at the end it holds the rate better, for a lower score.
for _name, _times, _limit, _rate in (
    ("limit", 1, 0.1, 2.0),
    ("limit_5", 4, 0.05, 4.0),
    ("limit_5_slow", 4, 0.05, 1.0),
):
    _held = {"limits": {"hallucination": _limit}, "multiplier_rate": _rate}
    RUNS[_name] = Run("reinforce", times=_times, restraints=_held)


def score(agent: TransformerAgent, split: str) -> dict[str, Any]:
    """Means of the parts, greedily and sampled, with their standard errors."""
    envs = gym.make_vec(ID, num_envs=ROWS, split=split, **LEVEL)
    result: dict[str, Any] = {}
    for name, generator in (("greedy", None), ("sampled", torch.Generator().manual_seed(0))):
        played = [collect(agent.policy, envs, seed, 1, generator) for seed in range(0, EPISODES, ROWS)]
        for part in PARTS:
            values = np.concatenate([rollout.parts[part] for rollout in played])
            result[f"{name}_{part}"] = round(float(values.mean()), 5)
            result[f"{name}_{part}_error"] = round(float(values.std(ddof=1) / math.sqrt(len(values))), 5)
    envs.close()
    return result


def execute(name: str, seed: int, steps: int, keep: Path) -> dict[str, Any]:
    """Train and score one run; its row."""
    folder, begin = keep / f"{name}_{seed}", time.process_time()
    if name == BASE:
        agent = TransformerAgent(
            ID, "nano", method=BASE, encoders=ENCODERS, device="cpu", seed=seed, env_kwargs=LEVEL
        )
        agent.learn(BASE_STEPS, out=folder)
    else:
        run = RUNS[name]
        agent = TransformerAgent(
            ID,
            method=run.method,
            init=keep / f"{BASE}_{seed}",
            device="cpu",
            seed=seed,
            env_kwargs={**LEVEL, **run.training},
            restraints=Restraints(**run.restraints),
        )
        agent.learn(steps * run.times, out=folder, checkpoint_steps=10**9)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "name": name,
        "seed": seed,
        "steps": agent.num_timesteps,
        "train_cpu_seconds": round(time.process_time() - begin, 1),
        **score(agent, "test"),
        "coefficients": agent.coefficients,
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
    }


def interval(values: list[float]) -> str:
    """Mean of the seeds and half the width of its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = _T[len(values) - 1] * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):.3f} ± {half:.3f}"


def table(path: Path) -> str:
    """What each algorithm reached, and its difference from the base of the same seed."""
    rows = {(row["name"], row["seed"]): row for row in map(json.loads, path.read_text().splitlines())}
    lines = [
        "| algorithm | seeds | steps | scene F1 | change | CIDEr-D | change | hallucination | change | minutes |",
        "|---|---:|---:|---|---|---|---|---|---|---:|",
    ]
    for name in (BASE, *RUNS):
        seeds = [seed for other, seed in rows if other == name]
        if not seeds:
            continue
        cells = []
        for part in ("scene_f1", "cider", "hallucination"):
            key = f"greedy_{part}"
            got = [rows[name, seed][key] for seed in seeds]
            cells += [
                interval(got),
                ""
                if name == BASE
                else interval([x - rows[BASE, s][key] for x, s in zip(got, seeds, strict=True)]),
            ]
        steps = np.mean([rows[name, seed]["steps"] for seed in seeds])
        minutes = np.mean([rows[name, seed]["train_cpu_seconds"] for seed in seeds]) / 60
        label = name if name == BASE else RUNS[name].method
        if name != BASE and RUNS[name].restraints:
            held = RUNS[name].restraints
            label += f", hallucination at most {held['limits']['hallucination']:.0%}"
            label += f" (multiplier rate {held['multiplier_rate']:g})"
        lines.append(f"| {label} | {len(seeds)} | {steps:,.0f} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--keep", type=Path, default=Path("runs/captioning"), help="folder for the agents")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS), metavar="RUN")
    parser.add_argument("--seeds", type=int, choices=range(1, 6), default=3)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--table", action="store_true", help="print the table of what is done, train nothing")
    arguments = parser.parse_args()
    path = arguments.out / "captioning.jsonl"
    if not arguments.table:
        torch.set_num_threads(1)
        path.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(arguments.seeds):
            for name in (BASE, *arguments.only):
                known = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
                if any((row["name"], row["seed"]) == (name, seed) for row in known):
                    continue
                row = execute(name, seed, arguments.steps, arguments.keep)
                with path.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(name, seed, {part: row[f"greedy_{part}"] for part in PARTS}, flush=True)
    print(table(path))


if __name__ == "__main__":
    main()
