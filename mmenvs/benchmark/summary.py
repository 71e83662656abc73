"""From rows to what is said of them: each configuration on each task, and over all tasks.

A *task* is an id with the arguments of its environment, a *configuration* an embedding with an agent, its
width and its steps of training; the runs of one on the other differ in their seed. ``docs/compare.md``
has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.stats import Interval, bootstrap, interquartile_mean, spread

# What a budget can bound, with the unit it is written with.
BUDGETS = {"megabytes": "MB", "milliseconds": "ms", "seconds": "s of training", "parameters": "parameters"}

# Agents that learn nothing, by their names in ``mmenvs_agents``, with the names of the report.
BASELINES = {"random": "random", "most_frequent": "most frequent", "oracle": "oracle"}


@dataclass(frozen=True)
class Cell:
    """One configuration on one task.

    Attributes:
        task, configuration: their names.
        rows: its runs, one a seed, in the order of the seeds.
    """

    task: str
    configuration: str
    rows: tuple[Row, ...]

    def returns(self, split: str) -> list[list[float]]:
        """Returns of the episodes of each run."""
        return [row["scores"][split]["returns"] for row in self.rows]

    def reward(self, split: str) -> Interval:
        """Mean return over runs and episodes."""
        return bootstrap([self.returns(split)])

    def success(self, split: str) -> Interval:
        """Share of successful episodes over runs and episodes."""
        runs = []
        for row in self.rows:
            scores = row["scores"][split]
            n = len(scores["returns"])
            runs.append(np.arange(n) < round(scores["success"] * n))
        return bootstrap([runs])

    @cached_property
    def curve(self) -> list[tuple[int, Interval]]:
        """Step, and mean return of the training episodes that ended since the step before."""
        by_step: dict[int, list[list[float]]] = {}
        for row in self.rows:
            for step, value, *_ in row["curve"]:
                by_step.setdefault(step, []).append([value])
        return [(step, bootstrap([runs])) for step, runs in sorted(by_step.items())]

    @property
    def area(self) -> float:
        """Area under the learning curve, divided by its length."""
        return float(np.mean([point.value for _, point in self.curve]))

    def steps_to(self, threshold: float) -> int | None:
        """The first step at which the learning curve is at ``threshold``; None if it never is."""
        return next((step for step, point in self.curve if point.value >= threshold), None)

    @property
    def length(self) -> float:
        """Mean number of steps of an episode of the test split."""
        return self.mean("scores", "test", "length")

    @property
    def seed_spread(self) -> float | None:
        """Standard deviation of the test return over seeds."""
        return spread([row["scores"]["test"]["return"] for row in self.rows])

    @property
    def checkpoint_spread(self) -> float | None:
        """Standard deviation over the last checkpoints of a run, mean over runs."""
        spreads = [spread([value for _, value in row["checkpoints"]]) for row in self.rows]
        known = [value for value in spreads if value is not None]
        return float(np.mean(known)) if known else None

    @property
    def perturbed(self) -> dict[str, float]:
        """Mean return under each perturbation; ``"clean"`` is without, on the same episodes."""
        return {name: self.mean("perturbed", name) for name in self.rows[0]["perturbed"]}

    @property
    def drop(self) -> float | None:
        """What a perturbation takes off the return, mean over all of them."""
        scores = self.perturbed
        drops = [scores["clean"] - value for name, value in scores.items() if name != "clean"]
        return float(np.mean(drops)) if drops else None

    def cost(self, name: str) -> float | None:
        """A cost, median over the runs, as one of them may have shared the machine; None if it wasn't measured."""
        values = [row["cost"].get(name) for row in self.rows]
        known = [value for value in values if value is not None]
        return float(np.median(known)) if known else None

    def mean(self, *path: str) -> float:
        """Mean over the runs of the number at ``path`` in a row."""
        values = []
        for row in self.rows:
            value: Any = row
            for key in path:
                value = value[key]
            values.append(value)
        return float(np.mean(values))


@dataclass(frozen=True)
class Candidate:
    """One configuration over all tasks.

    Attributes:
        name: of the configuration.
        embedding, agent: of the configuration.
        score: mean over the tasks of the test return, brought to 0 to 1 by the bounds of each task.
        iqm: interquartile mean of the same.
        cost: by the names in ``BUDGETS``, the largest over the tasks of the median over the runs; None where a
            task lacks it.
        defaults: tasks without an observation that has this encoder: all encoders are the default there.
    """

    name: str
    embedding: str
    agent: str
    score: Interval
    iqm: Interval
    cost: dict[str, float | None]
    defaults: tuple[str, ...]

    @property
    def label(self) -> str:
        """The name, with the tasks on which the encoder it names isn't there."""
        return f"{self.name} (default encoders on {'; '.join(self.defaults)})" if self.defaults else self.name


@dataclass(frozen=True)
class Summary:
    """All cells, and what concerns several of them.

    Attributes:
        tasks, configurations: names in the order they were first run.
        cells: by task and configuration; a pair whose runs all failed has none.
        failed: the newest rows of runs that failed.
        baselines: by task and name in ``BASELINES``, where they were scored; their rows hold scores alone.
    """

    tasks: tuple[str, ...]
    configurations: tuple[str, ...]
    cells: dict[tuple[str, str], Cell]
    failed: tuple[Row, ...]
    baselines: dict[tuple[str, str], Cell]

    def of_task(self, task: str) -> list[Cell]:
        """The cells of a task in the order of the configurations."""
        found = [self.cells.get((task, name)) for name in self.configurations]
        return [cell for cell in found if cell is not None]

    def threshold(self, task: str) -> float:
        """80 % of the way from the task's lowest score to the best point of any learning curve on it."""
        cells = self.of_task(task)
        low = cells[0].rows[0]["bounds"][0]
        best = max(point.value for cell in cells for _, point in cell.curve)
        return low + 0.8 * (best - low)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Configurations with a score on every task, best first."""
        complete = [
            name for name in self.configurations if all((task, name) in self.cells for task in self.tasks)
        ]
        candidates = [self._candidate(name) for name in complete]
        return sorted(candidates, key=lambda candidate: (-candidate.score.value, candidate.name))

    @cached_property
    def baseline_scores(self) -> dict[str, Interval]:
        """Mean score over the tasks of each baseline, as of a candidate, where every task has it."""
        return {
            name: _mean_over_tasks([_normalised(self.baselines[task, name]) for task in self.tasks])
            for name in BASELINES
            if all((task, name) in self.baselines for task in self.tasks)
        }

    @property
    def incomplete(self) -> list[str]:
        """Configurations that lack a task, so that their mean can't be set beside that of the others."""
        ranked = {candidate.name for candidate in self.candidates}
        return [name for name in self.configurations if name not in ranked]

    def _candidate(self, name: str) -> Candidate:
        cells = [self.cells[task, name] for task in self.tasks]
        scores = [_normalised(cell) for cell in cells]
        costs = {key: [cell.cost(key) for cell in cells] for key in BUDGETS}
        run = cells[0].rows[0]["run"]
        return Candidate(
            name=name,
            embedding=run["embedding"],
            agent=run["agent"],
            score=_mean_over_tasks(scores),
            iqm=bootstrap(scores, interquartile_mean),
            cost={
                key: None if None in values else max(value for value in values if value is not None)
                for key, values in costs.items()
            },
            defaults=tuple(
                task
                for task, cell in zip(self.tasks, cells, strict=True)
                if "plan" in cell.rows[0]
                and encoder_of(run["embedding"]) not in cell.rows[0]["plan"]["encoders"].values()
            ),
        )


def summarise(rows: Iterable[Row]) -> Summary:
    """Sort rows into cells. Of several rows of the same run the newest counts.

    Raises:
        ValueError: without rows.
    """
    everything = {run_key(row["run"]): row for row in rows}
    newest = {key: row for key, row in everything.items() if "baseline" not in row["run"]}
    if not newest:
        raise ValueError("results must hold at least one row of a run")
    runs = [row["run"] for row in newest.values()]
    name = _namer(runs)
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in newest.values():
        if "error" not in row:
            cells.setdefault((task_name(row["run"]), name(row["run"])), []).append(row)
    return Summary(
        tasks=tuple(dict.fromkeys(map(task_name, runs))),
        configurations=tuple(dict.fromkeys(map(name, runs))),
        cells={
            key: Cell(*key, tuple(sorted(group, key=lambda row: row["run"]["seed"])))
            for key, group in cells.items()
        },
        failed=tuple(row for row in newest.values() if "error" in row),
        baselines={
            key: Cell(*key, (row,))
            for row in everything.values()
            if "baseline" in row["run"]
            for key in [(task_name(row["run"]), row["run"]["baseline"])]
        },
    )


def count(number: int, noun: str) -> str:
    """Such as ``"1 run"`` and ``"2 runs"``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def encoder_of(embedding: str) -> str:
    """What stands before the fusion; names and folders of models may hold a ``+`` themselves."""
    return embedding.rpartition("+")[0]


def few_episodes(episodes: int) -> int:
    """Episodes of the evaluations of checkpoints and perturbations, where there are many of them."""
    return max(1, episodes // 4)


def run_key(run: Mapping[str, Any]) -> str:
    """The same text for the same run."""
    return json.dumps(run, sort_keys=True)


def task_name(run: Mapping[str, Any]) -> str:
    """Such as ``"VQA-v0, difficulty 0"``."""
    arguments = [f"{key.replace('_', ' ')} {value}" for key, value in sorted(run["env_kwargs"].items())]
    return ", ".join([run["id"].removeprefix("MMRL/"), *arguments])


def _namer(runs: Sequence[Mapping[str, Any]]) -> Any:
    """A function from run to name of its configuration, which tells apart what differs within ``runs``."""
    parts = {
        "agent": "{}",
        "features_dim": "{} features",
        "num_envs": "{} rows",
        "steps": "{:,} steps",
        "episodes": "{:,} episodes",
    }
    varying = [key for key in parts if len({run.get(key) for run in runs}) > 1]

    def name(run: Mapping[str, Any]) -> str:
        extra = [parts[key].format(run[key]) for key in varying if run.get(key) is not None]
        return ", ".join([" + ".join(run["embedding"].rsplit("+", 1)), *extra])

    return name


def _normalised(cell: Cell) -> list[list[float]]:
    low, high = cell.rows[0]["bounds"]
    return [[(x - low) / (high - low) for x in run] for run in cell.returns("test")]


def _mean_over_tasks(tasks: Sequence[Sequence[Sequence[float]]]) -> Interval:
    """Every task counts alike, also where one has more runs than another."""
    weights = np.concatenate([np.full(len(runs), 1 / (len(runs) * len(tasks))) for runs in tasks])
    return bootstrap(tasks, lambda scores: scores @ weights)
