"""The tables of a benchmark's report."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial

import numpy as np

from mmenvs.benchmark import stats
from mmenvs.benchmark.board import Board
from mmenvs.benchmark.differences import (
    improvement,
    paired_difference,
    pooled_spread,
    seeds_needed,
)
from mmenvs.benchmark.page import Table, Value, provenance_table
from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.store import MAIN
from mmenvs.benchmark.suites import HARDER
from mmenvs.benchmark.summary import BASELINES, count

COMPARED = 12  # agents in the tables of pairs and in the figures
_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2)


def tables(board: Board) -> list[Table]:
    """All tables of the report, the leaderboard first."""
    found = [leaderboard(board), _by_tag(board)]
    found += [_criteria(board, task) for task in board.tasks]
    found += [_dropped(board, task) for task in board.tasks]
    found += [_types(board, task) for task in board.tasks]
    found += [_improvement(board), *(_paired(board, split) for split in ("test", *board.further_splits))]
    found += [_power(board), _failures(board), provenance_table(
        [{"provenance": json.loads(origin)} for origin, n in board.origins.items() for _ in range(n)]
    )]  # fmt: skip
    return [found[0], *(table for table in found[1:] if table.rows)]


def leaderboard(board: Board) -> Table:
    """Scores of every ranked agent over all tasks, and what it costs."""
    between = "0 random, 1 oracle"
    columns: dict[str, Callable[[str], Value]] = {
        "agent": lambda a: a,
        "runs": lambda a: sum(map(len, board.of(a).values())),
        **{f"{between}: {name}": _aggregate(board, "test", name) for name in stats.AGGREGATES},
        **{
            f"further: interquartile mean, {split}": _aggregate(board, split, "interquartile mean")
            for split in board.further_splits
        },
        "further: mean above blind": _aggregate(board, "test", "mean", "blind"),
        "cost: minutes of training": lambda a: _minutes(board.cost(a, "seconds")),
        "cost: decisions / s": lambda a: board.cost(a, "decisions_per_second"),
        "cost: parameters": lambda a: board.cost(a, "parameters"),
    }
    sampled = "seeds and episodes" if board.several_seeds else "episodes alone, as there is one seed"
    note = (
        f"Greedy, test split; 95 % intervals over {sampled}. Blind: the best of the agents that lack a "
        "modality and of the most frequent answer, so that what is above 0 takes all modalities."
    )
    if HARDER in board.further_splits:
        note += " Harder: the test split at the next difficulty, on which no agent has trained."
    rows = [[column(agent) for column in columns.values()] for agent in board.ranked]
    if board.left_out:
        note += (
            f" {count(board.left_out, 'further agent')} with lower scores or without all tasks: in the store."
        )
    if not rows:
        note = "No agent has a score on every task beside random and oracle."
        rows = [[agent, *[None] * (len(columns) - 1)] for agent in board.agents]
    return Table("Leaderboard", note, tuple(columns), rows)


def _aggregate(board: Board, split: str, name: str, kind: str = "random") -> Callable[[str], Value]:
    return lambda agent: board.aggregates(agent, split, kind).get(name)


def _minutes(seconds: float | None) -> float | None:
    return seconds / 60 if seconds else None


def _by_tag(board: Board) -> Table:
    rows: list[list[Value]] = []
    for agent in board.agents:
        values = [board.aggregates(agent, "test", tasks=tasks).get("mean") for tasks in board.tags.values()]
        if any(value is not None for value in values):
            rows.append([agent, *values])
    note = "Normalised mean over the tasks with the tag; – for an agent that lacks one of them."
    return Table("By tag", note, ("agent", *board.tags), rows if board.tags else [])


def _criteria(board: Board, task: str) -> Table:
    """Reward, episode length, stability and efficiency of every agent on a task."""
    agents = [agent for agent in board.agents if (agent, task) in board.cells]

    def mean(agent: str, evaluation: str, key: str) -> Value:
        records = board.cells[agent, task]
        values = [record.scores[evaluation][key] for record in records if evaluation in record.scores]
        return float(np.mean(values)) if len(values) == len(records) else None

    def reward(agent: str, split: str) -> Value:
        records = board.cells[agent, task]
        known = all(split in record.returns for record in records)
        return stats.bootstrap([[record.returns[split] for record in records]]) if known else None

    def over_checkpoints(agent: str) -> Value:
        lasts = [[score for _, score in record.curve[-3:]] for record in board.cells[agent, task]]
        spreads = [spread for last in lasts if (spread := stats.spread(last)) is not None]
        return float(np.mean(spreads)) if spreads else None

    def cost(agent: str, key: str) -> Value:
        known = [value for r in board.cells[agent, task] if (value := r.cost.get(key)) is not None]
        return float(np.median(known)) if known and agent in board.trained() else None

    columns: dict[str, Callable[[str], Value]] = {
        "agent": lambda a: a,
        "runs": lambda a: len(board.cells[a, task]),
        "reward: return, test": lambda a: reward(a, "test"),
        "reward: sampled": lambda a: mean(a, "test/sampled", "return"),
        "reward: success, test": lambda a: mean(a, MAIN, "success"),
        **{f"reward: return, {split}": partial(reward, split=split) for split in board.further_splits},
        "length: steps an episode": lambda a: mean(a, MAIN, "length"),
        "stability: over seeds": lambda a: stats.spread(
            [float(r.returns["test"].mean()) for r in board.cells[a, task]]
        ),
        "stability: over checkpoints": over_checkpoints,
        "efficiency: s of training": lambda a: cost(a, "seconds"),
        "efficiency: CPU s": lambda a: cost(a, "cpu_seconds"),
        "efficiency: decisions / s": lambda a: cost(a, "decisions_per_second"),
    }
    note = "Over checkpoints: standard deviation of the last three, mean over runs."
    return Table(task, note, tuple(columns), [[column(a) for column in columns.values()] for a in agents])


def _dropped(board: Board, task: str) -> Table:
    shown = board.trained()
    names = list(
        dict.fromkeys(
            name
            for agent in shown
            for record in board.cells.get((agent, task), [])
            for name in record.scores
            if "without" in name
        )
    )
    rows: list[list[Value]] = []
    for agent in shown:
        records = board.cells.get((agent, task), [])
        if records and any(name in record.scores for record in records for name in names):
            row: list[Value] = [agent]
            for name in (MAIN, *names):
                known = [r.scores[name]["return"] for r in records if name in r.scores]
                row.append(float(np.mean(known)) if known else None)
            rows.append(row)
    columns = ("agent", "return, test", *(name.partition("greedy/")[2] for name in names))
    note = "Mean over seeds; without a modality on the first quarter of each row of episodes."
    return Table(f"Without a modality: {task}", note, columns, rows)


def _types(board: Board, task: str) -> Table:
    agents = [agent for agent in board.agents if (agent, task) in board.cells]
    kinds = list(
        dict.fromkeys(
            kind
            for agent in agents
            for r in board.cells[agent, task]
            for kind in r.scores[MAIN].get("by_type", {})
        )
    )
    rows: list[list[Value]] = []
    for kind in kinds:
        row: list[Value] = [kind.replace("_", " ")]
        for agent in agents:
            known = [r.scores[MAIN].get("by_type", {}).get(kind) for r in board.cells[agent, task]]
            values = [value for value in known if value is not None]
            row.append(float(np.mean(values)) if values else None)
        rows.append(row)
    note = "Success on the test split, mean over seeds."
    return Table(f"By type of question: {task}", note, ("question", *agents), rows)


def _improvement(board: Board) -> Table:
    names = [agent for agent in board.ranked if agent != "oracle"][:COMPARED]
    draws = {
        name: stats.resampled(runs, stats.RESAMPLES, number)
        for number, name in enumerate(names)
        if (runs := board.over_tasks(name, "test", board.tasks)) is not None
    }
    found: dict[tuple[str, str], Value] = {(name, name): None for name in names}
    for a, b in itertools.combinations(names, 2):
        better = improvement(draws[a], draws[b])
        found[a, b] = better
        found[b, a] = Interval(1 - better.value, 1 - better.high, 1 - better.low)
    rows: list[list[Value]] = [[a, *(found[a, b] for b in names)] for a in names]
    note = "How probably a run of the agent at the left scores above one of the agent at the top, mean over tasks."
    return Table("Probability of improvement", note, ("agent", *names), rows if len(names) > 1 else [])


def _paired(board: Board, split: str) -> Table:
    trained = set(board.trained())
    ranked = [agent for agent in board.ranked if agent in trained]
    if not ranked:
        return Table("", "", ("agent",), [])
    best, *others = ranked[:COMPARED]
    rows: list[list[Value]] = []
    alone = False
    for agent in [*others, *(name for name in BASELINES.values() if name in board.agents)]:
        row: list[Value] = [agent]
        for task in board.tasks:
            pair = [
                [r.returns[split] for r in board.cells.get((name, task), []) if split in r.returns]
                for name in (agent, best)
            ]
            lengths = {len(run) for runs in pair for run in runs}
            if not all(pair) or len(lengths) != 1 or min(lengths) < 2:
                row.append(None)
                continue
            found = paired_difference(pair[0], pair[1])
            alone |= not found.over_seeds
            row.append(found.interval())
        rows.append(row)
    note = (
        f"Return on the {split} split less that of {best}, on identical episodes; 95 % intervals with standard "
        "errors clustered by episode and by run."
    )
    if alone:
        note += " Against an agent with a single run they speak of other episodes, not of other seeds."
    head = f"Differences to {best}" if split == "test" else f"Differences to {best}, {split}"
    return Table(head, note, ("agent", *board.tasks), rows)


def _power(board: Board) -> Table:
    groups: list[list[float]] = []
    for agent in board.trained():
        for task in board.of(agent):
            runs = board.normalised(agent, task, "test")
            groups += [] if runs is None else [[float(run.mean()) for run in runs]]
    deviation = pooled_spread(groups)
    if deviation is None:
        return Table("", "", ("difference",), [])
    over = deviation / len(board.tasks) ** 0.5
    rows: list[list[Value]] = [
        [f"{d:g}", seeds_needed(d, deviation), seeds_needed(d, over)] for d in _DIFFERENCES
    ]
    note = (
        f"Seeds that each of two agents needs so that a difference of normalised scores is seen with 80 % power at "
        f"5 % (two-sided), from the standard deviation over seeds of these runs, {deviation:.3f} pooled."
    )
    columns = ("difference", "seeds, one task", f"seeds, mean over {count(len(board.tasks), 'task')}")
    return Table("Power", note, columns, rows)


def _failures(board: Board) -> Table:
    rows: list[list[Value]] = [
        [row["run"]["agent"], row["run"]["id"], row["run"]["difficulty"], row["run"]["seed"], row["error"]]
        for row in board.failed
    ]
    note = "mmenvs benchmark --resume tries them again."
    return Table("Runs that failed", note, ("agent", "id", "difficulty", "seed", "error"), rows)
