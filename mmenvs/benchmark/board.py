"""From the rows of a store to what is said of them: each agent on each task, and over all tasks.

A *task* is an id at a difficulty, an *agent* one with its embedding; its runs on a task differ in their seed.
``docs/benchmark.md`` has the formulas.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mmenvs.benchmark import players, stats
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.stats import Array, Interval
from mmenvs.benchmark.store import Store
from mmenvs.benchmark.suites import SUITES, tags_of
from mmenvs.benchmark.summary import BASELINES

SHOWN = 30
_BLIND_TO = "blind to "


@dataclass(frozen=True)
class Record:
    """What is kept of the last row of a run.

    Attributes:
        run, cost: as in the row.
        scores: by evaluation, ``return``, ``success``, ``length`` and ``by_type``.
        returns: of the episodes, ``(episodes,)``, by split, greedy.
        curve: step and test score of each checkpoint, the last row included.
        examples: seed and actions of single test episodes.
    """

    run: dict[str, Any]
    scores: dict[str, Any]
    returns: dict[str, Array]
    cost: dict[str, float | None]
    curve: list[tuple[int, float]]
    examples: list[dict[str, Any]]


@dataclass(frozen=True)
class Board:
    """All runs of one suite.

    Attributes:
        suite: its name.
        tasks, agents: names, tasks in the order of the suite, agents in that of the alphabet after the baselines, which are agents too.
        cells: by agent and task, the runs by seed.
        failed: rows of runs that failed.
        origins: how many runs come from each origin, as JSON.
        codes: versions of the code that rows of the store come from.
        others: names of other suites in the store, whose rows are left out.
        left_out: how many further agents there are, that score less than these.
    """

    suite: str
    tasks: tuple[str, ...]
    agents: tuple[str, ...]
    cells: dict[tuple[str, str], list[Record]]
    failed: tuple[Row, ...]
    origins: dict[str, int]
    codes: tuple[str, ...]
    others: tuple[str, ...]
    left_out: int
    _floors: dict[Any, float | None] = field(default_factory=dict, repr=False)
    _aggregates: dict[Any, dict[str, Interval]] = field(default_factory=dict, repr=False)

    def of(self, agent: str) -> dict[str, list[Record]]:
        """The runs of an agent by task."""
        return {task: self.cells[agent, task] for task in self.tasks if (agent, task) in self.cells}

    def id_of(self, task: str) -> str:
        """The environment of a task."""
        return next(str(records[0].run["id"]) for (_, name), records in self.cells.items() if name == task)

    def floor(self, task: str, split: str, kind: str) -> float | None:
        """The score that counts as 0: of the random agent, or of the best one that lacks a modality or looks at nothing.
        None if no agent that lacks one was there."""
        key = (task, split, kind)
        if key not in self._floors:
            names = ["random"]
            if kind == "blind":
                blind = [name for name in self.agents if _is_blind(name) and (name, task) in self.cells]
                names = [*blind, BASELINES["most_frequent"]] if blind else []
            scores = [score for name in names if (score := self.mean(name, task, split)) is not None]
            self._floors[key] = max(scores) if scores else None
        return self._floors[key]

    def mean(self, agent: str, task: str, split: str) -> float | None:
        """Mean return over runs and episodes; None where it is missing."""
        records = self.cells.get((agent, task), [])
        if not records or any(split not in record.returns for record in records):
            return None
        return float(np.mean([record.returns[split].mean() for record in records]))

    def normalised(self, agent: str, task: str, split: str, kind: str = "random") -> list[Array] | None:
        """Episodes of each run between a floor and the oracle; None where one of these is missing."""
        low, high = self.floor(task, split, kind), self.mean("oracle", task, split)
        if self.mean(agent, task, split) is None or low is None or high is None or not high > low:
            return None
        records = self.cells[agent, task]
        return [stats.normalised(record.returns[split], low, high) for record in records]

    def over_tasks(
        self, agent: str, split: str, tasks: Sequence[str], kind: str = "random"
    ) -> list[list[Array]] | None:
        """Normalised runs of each of ``tasks``; None if any is missing: different sets aren't averaged."""
        found = [self.normalised(agent, task, split, kind) for task in tasks]
        complete = [runs for runs in found if runs is not None]
        return complete if tasks and len(complete) == len(found) else None

    def aggregates(
        self, agent: str, split: str, kind: str = "random", tasks: Sequence[str] | None = None
    ) -> dict[str, Interval]:
        """``stats.AGGREGATES`` over tasks, all by default; empty if any task is missing."""
        key = (agent, split, kind, self.tasks if tasks is None else tuple(tasks))
        if key not in self._aggregates:
            runs = self.over_tasks(agent, split, key[3], kind)
            self._aggregates[key] = {} if runs is None else stats.aggregates(runs)
        return self._aggregates[key]

    @cached_property
    def ranked(self) -> list[str]:
        """Agents with a normalised score on every task, best interquartile mean on the test split first."""
        known = {}
        for agent in self.agents:
            runs = self.over_tasks(agent, "test", self.tasks)
            if runs is not None:
                means = [np.array([run.mean() for run in of_task]) for of_task in runs]
                known[agent] = float(stats.interquartile_mean_of_tasks(means))
        return sorted(known, key=lambda agent: (-known[agent], agent))

    @property
    def unranked(self) -> list[str]:
        """Agents that lack a task, so that no mean of theirs can stand beside the others'."""
        ranked = set(self.ranked)
        return [agent for agent in self.agents if agent not in ranked]

    @property
    def tags(self) -> dict[str, list[str]]:
        """The tasks of each tag of the environments."""
        found: dict[str, list[str]] = {}
        for task in self.tasks:
            for tag in tags_of(self.id_of(task)):
                found.setdefault(tag, []).append(task)
        return found

    @property
    def several_seeds(self) -> bool:
        """Whether any agent has more than one run on a task."""
        return any(len(records) > 1 for records in self.cells.values())

    @cached_property
    def further_splits(self) -> list[str]:
        """What agents were evaluated on beside the test split."""
        found = dict.fromkeys(split for records in self.cells.values() for split in records[0].returns)
        return [split for split in found if split != "test"]

    def trained(self) -> list[str]:
        """Agents that are no baselines."""
        return [agent for agent in self.agents if agent not in BASELINES.values()]

    def cost(self, agent: str, name: str) -> float | None:
        """A cost: the median over the runs of a task, mean over tasks; None where it wasn't measured."""
        medians = []
        for records in self.of(agent).values():
            known = [value for record in records if (value := record.cost.get(name)) is not None]
            if known:
                medians.append(float(np.median(known)))
        return float(np.mean(medians)) if medians else None


def read(store: Store, suite: str | None = None) -> Board:
    """Sort the rows of a store; of many agents only those that a report has room for are read.

    Args:
        store: at least one run must be finished.
        suite: name of the suite; None is that of the newest row.

    Raises:
        ValueError: without a finished run (of the suite), or if the store is damaged.
    """
    everything: dict[str, list[tuple[int, str, str, str, float]]] = {}
    last = None
    for n, run, score in store.scores():
        last = sys.intern(str(run["suite"]))
        name, embedding = sys.intern(_agent_name(run)), sys.intern(run["embedding"])
        everything.setdefault(last, []).append((n, name, embedding, sys.intern(task_name(run)), score))
    suite = last if suite is None else suite
    if suite not in everything:
        failed = next((f"; one that failed: {row['error']}" for row in store.failures()), "")
        raise ValueError(f"{str(store.path)!r} holds no finished run of the suite{failed}")
    found = everything[suite]
    several = len({embedding for _, _, embedding, _, _ in found} - {""}) > 1
    scores: dict[str, dict[str, list[float]]] = {}
    named = []
    for n, name, embedding, task, score in found:
        agent = f"{name}, {embedding.replace('+', ' + ')}" if several and embedding else name
        scores.setdefault(agent, {}).setdefault(task, []).append(score)
        named.append((n, agent, task))
    chosen = _chosen(scores)
    cells: dict[tuple[str, str], list[Record]] = {}
    origins: Counter[str] = Counter()
    places = [(agent, task) for _, agent, task in named if agent in chosen]
    rows = store.rows(n for n, agent, _ in named if agent in chosen)
    for place, row in zip(places, rows, strict=True):
        origin = {key: value for key, value in row["provenance"].items() if key != "written"}
        origins[json.dumps(origin, sort_keys=True)] += 1
        curve = store.curve(row["run"])
        if not curve or curve[-1][0] != row["step"]:
            raise ValueError(f"{str(store.path)!r} is damaged: the last row of a run isn't among its rows")
        cells.setdefault(place, []).append(_record(row, curve))
    for group in cells.values():
        group.sort(key=lambda record: record.run["seed"])
    return Board(
        suite=suite,
        # Not as they were done, which workers side by side do in another order each time.
        tasks=_in_order(suite, {task for _, task in cells}),
        agents=tuple(
            sorted({agent for agent, _ in cells}, key=lambda agent: (agent not in BASELINES.values(), agent))
        ),
        cells=cells,
        failed=tuple(row for row in store.failures() if row["run"]["suite"] == suite),
        origins=dict(origins),
        codes=tuple(store.codes()),
        others=tuple(name for name in everything if name != suite),
        left_out=len(scores) - len(chosen),
    )


def _chosen(scores: dict[str, dict[str, list[float]]]) -> set[str]:
    """The baselines, the agents with the best interquartile means, and some that lack a task."""
    tasks = list(dict.fromkeys(task for of_agent in scores.values() for task in of_agent))
    known: dict[str, float] = {}
    for agent, of_agent in scores.items():
        values = []
        for task in tasks:
            low, high = (scores.get(name, {}).get(task) for name in ("random", "oracle"))
            if task in of_agent and low and high and np.mean(high) > np.mean(low):
                values.append(stats.normalised(of_agent[task], float(np.mean(low)), float(np.mean(high))))
        if len(values) == len(tasks):
            known[agent] = float(stats.interquartile_mean_of_tasks(values))
    known = {agent: score for agent, score in known.items() if agent not in BASELINES.values()}
    best = sorted(known, key=lambda agent: (-known[agent], agent))[:SHOWN]
    rest = [agent for agent in scores if agent not in known and agent not in BASELINES.values()][:SHOWN]
    floors = [name for name in scores if name in BASELINES.values() or _is_blind(name)]
    return {*best, *rest, *floors}


def _is_blind(agent: str) -> bool:
    return agent.startswith(_BLIND_TO)


def tasks_of(suite: str) -> list[str]:
    """The tasks of a suite, whatever its budget; none of one that isn't known here."""
    known = SUITES.get(suite.partition(" (")[0])
    return [] if known is None else [task_name(vars(task)) for task in known.tasks]


def _in_order(suite: str, tasks: set[str]) -> tuple[str, ...]:
    """``tasks`` as the suite has them; those that it hasn't by name."""
    order = tasks_of(suite)
    return tuple(sorted(tasks, key=lambda task: (order.index(task) if task in order else len(order), task)))


def task_name(run: dict[str, Any]) -> str:
    """Such as ``"VQA-v0, difficulty 0"``."""
    return f"{run['id'].removeprefix('MMRL/')}, difficulty {run['difficulty']}"


def _agent_name(run: dict[str, Any]) -> str:
    agent = str(run["agent"])
    if agent.startswith(players.BLIND):
        return f"{_BLIND_TO}{agent.removeprefix(players.BLIND)}"
    if agent.startswith(players.POLICY):
        return agent.removeprefix(players.POLICY)
    return BASELINES.get(agent, agent)


def _record(row: Row, curve: list[tuple[int, float]]) -> Record:
    splits = {name.split("/")[0]: score for name, score in row["scores"].items() if "returns" in score}
    return Record(
        run=row["run"],
        scores={
            name: {key: value for key, value in score.items() if key != "returns"}
            for name, score in row["scores"].items()
        },
        returns={split: np.asarray(score["returns"], np.float32) for split, score in splits.items()},
        cost=row["cost"],
        curve=curve,
        examples=row.get("examples", []),
    )
