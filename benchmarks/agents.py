"""The transformer agent beside PPO of Stable-Baselines3: VQA at difficulty 1, the same frozen encoders, the same steps.

    OMP_NUM_THREADS=1 python benchmarks/agents.py --out docs/results           # all that isn't there yet
    OMP_NUM_THREADS=1 python benchmarks/agents.py --only transformer --seeds 1 # one agent, one seed
    OMP_NUM_THREADS=1 python benchmarks/agents.py --epochs 3 --minibatches 8 --memory-mb 512 --out DIR  # more from each step
    python benchmarks/agents.py --table                                        # the table of what is done

Each is scored greedily on the same 2,000 episodes of the test and of the compositional split. Each run appends one
row to ``agents.jsonl`` in the folder.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captioning import interval
from mmenvs_agents import sb3
from mmenvs_agents.evaluation import evaluate
from mmenvs_agents.transformer.agent import TransformerAgent
from mmenvs_agents.transformer.ppo import PPORecipe

import mmenvs  # noqa: F401

ID, LEVEL, STEPS = "MMRL/VQA-v0", {"difficulty": 1}, 100_000
ENCODERS = {"image": "shapes", "question": "shapes"}
OURS = "transformer"
AGENTS = {OURS: "transformer agent, nano", "concat": "PPO, concat", "fusion": "PPO, transformer fusion"}
FUSIONS = {"concat": "concat", "fusion": "transformer"}
SPLITS, EPISODES = ("test", "compositional"), 2000


def execute(name: str, seed: int, steps: int, recipe: PPORecipe) -> dict[str, Any]:
    """Train and score one run; its row."""
    begin = time.process_time()
    player: Any
    if name == OURS:
        player = TransformerAgent(
            ID, recipe=recipe, encoders=ENCODERS, device="cpu", seed=seed, env_kwargs=LEVEL
        )
        player.learn(steps)
    else:
        player = sb3.make_agent(
            "ppo", ID, fusion=FUSIONS[name], encoders=ENCODERS, device="cpu", seed=seed, env_kwargs=LEVEL
        )
        sb3.train(player, steps, progress=False)
    took = time.process_time() - begin
    settings = asdict(recipe) if name == OURS else sb3.settings_of(player).recipe
    row = {"name": name, "seed": seed, "steps": steps, "recipe": settings, "train_cpu_seconds": took}
    for split in SPLITS:
        result = evaluate(player, ID, split=split, episodes=EPISODES, env_kwargs=LEVEL)
        row[split] = result.mean_return
        row[f"{split}_by_type"] = {kind: rate.value for kind, rate in result.by_type.items()}
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {**row, "torch": torch.__version__, "commit": commit.stdout.strip()}


def table(path: Path) -> str:
    """What each agent reached, and what the transformer agent has more, seed by seed."""
    rows = {(row["name"], row["seed"]): row for row in map(json.loads, path.read_text().splitlines())}
    lines = [
        "| agent | seeds | steps | test | transformer agent, more | compositional | transformer agent, more | minutes |",
        "|---|---:|---:|---|---|---|---|---:|",
    ]
    for name, label in AGENTS.items():
        seeds = [seed for other, seed in sorted(rows) if other == name]
        if not seeds:
            continue
        cells = []
        for split in SPLITS:
            both = [seed for seed in seeds if (OURS, seed) in rows and name != OURS]
            more = [rows[OURS, seed][split] - rows[name, seed][split] for seed in both]
            cells += [interval([rows[name, seed][split] for seed in seeds]), interval(more) if more else ""]
        minutes = np.mean([rows[name, seed]["train_cpu_seconds"] for seed in seeds]) / 60
        steps = rows[name, seeds[0]]["steps"]
        lines.append(f"| {label} | {len(seeds)} | {steps:,} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--only", nargs="*", choices=list(AGENTS), default=list(AGENTS), metavar="AGENT")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--steps", type=int, default=STEPS)
    for name in ("epochs", "minibatches", "memory_mb"):
        flag, default = f"--{name.replace('_', '-')}", getattr(PPORecipe(), name)
        parser.add_argument(flag, type=int, default=default, help="of the transformer agent's recipe")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    options = parser.parse_args()
    recipe = PPORecipe(epochs=options.epochs, minibatches=options.minibatches, memory_mb=options.memory_mb)
    path = options.out / "agents.jsonl"
    if not options.table:
        options.out.mkdir(parents=True, exist_ok=True)
        done = set()
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            done = {(row["name"], row["seed"]) for row in rows}
            # Rows of before they held it are left out.
            other = [
                row
                for row in rows
                if row["name"] == OURS and row.get("recipe", asdict(recipe)) != asdict(recipe)
            ]
            if other or any(row["steps"] != options.steps for row in rows):
                parser.error(f"{path} holds runs of other steps or another recipe: choose another --out")
        for seed in range(options.seeds):
            for name in options.only:
                if (name, seed) not in done:
                    row = execute(name, seed, options.steps, recipe)
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{name}, seed {seed}: {row['test']:.3f}, {row['compositional']:.3f}", flush=True)
    print(table(path))


if __name__ == "__main__":
    main()
