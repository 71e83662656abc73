"""What the benchmark's runner, evaluation and store cost.

python benchmarks/benchmark.py pool                   # 8 equal runs, two processes against one
python benchmarks/benchmark.py overhead               # what is neither training nor evaluation
python benchmarks/benchmark.py evaluate               # against evaluate_policy of Stable-Baselines3
python benchmarks/benchmark.py store --rows 1_000_000 # append a row; build the report
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmenvs.benchmark import job, pool, results, runner
from mmenvs.benchmark.plan import Plan
from mmenvs.benchmark.store import Store

VQA = "MMRL/VQA-v0"


def _ppo_runs(number: int, steps: int) -> list[dict[str, Any]]:
    runs = Plan(agents=("ppo",), seeds=number, steps=steps, episodes=200).runs()
    return [run for run in runs if run["agent"] == "ppo" and run["id"] == VQA and run["difficulty"] == 0]


def _wall(runs: list[dict[str, Any]], workers: int) -> float:
    begin = time.perf_counter()
    events = pool.run_all(runs, job.execute, workers=workers, device="cpu", threads=1, timeout=3600)
    failed = [event.rows for event in events if isinstance(event, pool.Done) and "error" in event.rows[-1]]
    assert not failed, failed
    return time.perf_counter() - begin


def measure_pool(steps: int) -> None:
    """Wall time of 8 equal runs, one after the other in one process and in two."""
    runs = _ppo_runs(8, steps)
    one, two = _wall(runs, 1), _wall(runs, 2)
    print(f"8 runs of PPO, {steps:,} steps: one process {one:.1f} s, two {two:.1f} s: {one / two:.2f} times")


def measure_overhead(steps: int) -> None:
    """The share of a benchmark's wall time that is neither training nor evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        runner.benchmark(
            Plan(suite="core", agents=("ppo",), seeds=1, steps=steps, device="cpu"), Path(folder)
        )
        wall = time.perf_counter() - begin
        with Store(folder) as store:
            used = sum(row["cost"]["seconds"] + row["cost"]["evaluation_seconds"] for row in store.finals())
    print(f"{wall:.1f} s, of them {used:.1f} s training and evaluation: overhead {1 - used / wall:.1%}")


def measure_evaluation(episodes: int) -> None:
    """Episodes a second of processor time of ours and of ``evaluate_policy``, one model, the same episodes."""
    from mmenvs_agents import sb3
    from mmenvs_agents.evaluation import evaluate
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    agent = sb3.make_agent("ppo", VQA, fusion="concat", encoders={}, device="cpu")
    sb3.train(agent, 4096, progress=False)
    evaluate(agent, VQA, episodes=64)
    begin = time.process_time()
    ours = evaluate(agent, VQA, episodes=episodes)
    ours_seconds = time.process_time() - begin
    print(
        f"{episodes:,} episodes: evaluate {episodes / ours_seconds:,.0f} a second, score {ours.mean_return:.4f}"
    )
    for rows in (1, 64):
        env = make_vec_env(VQA, rows, seed=0, env_kwargs={"split": "test"})
        begin = time.process_time()
        theirs, _ = evaluate_policy(agent, env, episodes)
        seconds = time.process_time() - begin
        env.close()
        same = evaluate(agent, VQA, episodes=episodes, num_envs=rows).mean_return
        print(
            f"evaluate_policy with {rows} environments {episodes / seconds:,.0f} a second, "
            f"{seconds / ours_seconds:.1f} times as long; score {theirs:.4f}, evaluate on these episodes {same:.4f}"
        )


def measure_store(rows: int) -> None:
    """Time to append a run of one row to a store of many agents, and to build its report; peak memory."""
    folder = Path(tempfile.mkdtemp())
    runs = Plan(suite="core", agents=("ppo",), seeds=20, steps=1000, episodes=100).runs()
    baselines = [run for run in runs if not run["steps"]]
    others = [run for run in runs if run["steps"]]
    agents = max(1, rows // (len(others) * (len(others[0]["checkpoints"]) + 1)))
    generator = np.random.default_rng(0)
    with Store(folder, write=True) as store:
        for run in baselines:
            store.append(_made_up(run, generator))
        store.database.execute("PRAGMA synchronous=OFF")
        few = min(agents, 20)
        for agent in range(few):
            rows_of_agent = [_made_up({**run, "agent": f"agent {agent}"}, generator) for run in others]
            store.append([row for rows_of_run in rows_of_agent for row in rows_of_run])
        # The others play like one of these: their rows are copied, with a name of their own.
        for agent in range(few, agents):
            store.database.execute(
                "INSERT INTO rows (run, step, final, score, error, code, body) SELECT replace(run, ?1, ?2), step, "
                "final, score, error, code, replace(body, ?1, ?2) FROM rows "
                "WHERE json_extract(run, '$.agent') = ?3 AND n <= ?4",
                (
                    f'"agent {agent % few}"',
                    f'"agent {agent}"',
                    f"agent {agent % few}",
                    few * len(others) * 5 + 100,
                ),
            )
        store.database.execute("PRAGMA synchronous=FULL")
        times = []
        for i in range(200):
            row = _made_up({**others[0], "seed": 1000 + i}, generator)[-1:]
            begin = time.perf_counter()
            store.append(row)
            times.append(time.perf_counter() - begin)
        count = store.count()
    size = (folder / "results.sqlite").stat().st_size / 1e9
    print(
        f"{count:,} rows, {size:.2f} GB: append {np.median(times) * 1e3:.1f} ms (99 %: {np.quantile(times, 0.99) * 1e3:.1f})"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    begin = time.perf_counter()
    results.write(folder, folder / "report")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    page = (folder / "report" / "report.html").stat().st_size / 1e6
    print(
        f"report of {page:.1f} MB in {time.perf_counter() - begin:.1f} s, peak memory {peak:.2f} GB ({before:.2f} before)"
    )


def _made_up(run: dict[str, Any], generator: np.random.Generator) -> list[dict[str, Any]]:
    skill = {"oracle": 1.0, "random": 0.05, "most_frequent": 0.25}.get(run["agent"], 0.6)
    found = []
    for share in (*run["checkpoints"], 1.0) if run["steps"] else (1.0,):
        returns = (generator.random(run["episodes"]) < skill).astype(int).tolist()
        mean = sum(returns) / len(returns)
        score = {"return": mean, "success": mean, "length": 1, "by_type": {}}
        row: dict[str, Any] = {"run": run, "step": round(run["steps"] * share), "final": share == 1.0,
                               "scores": {"test/greedy": score}, "provenance": {"code": "made up"}}  # fmt: skip
        if share == 1.0:
            row["scores"] = {
                split: {**score, "returns": returns} for split in ("test/greedy", "compositional/greedy")
            }
            row["cost"] = {
                "seconds": 60.0,
                "cpu_seconds": 50.0,
                "parameters": 1000,
                "decisions_per_second": 900.0,
            }
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("pool", "overhead", "evaluate", "store"))
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--episodes", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    match options.what:
        case "pool":
            measure_pool(options.steps)
        case "overhead":
            measure_overhead(options.steps)
        case "evaluate":
            measure_evaluation(options.episodes)
        case "store":
            measure_store(options.rows)


if __name__ == "__main__":
    main()
