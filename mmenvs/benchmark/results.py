"""``mmenvs report``: one HTML page, Markdown, CSV and SVG of a benchmark's store."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mmenvs.benchmark import episodes, plots, stats
from mmenvs.benchmark.board import Board, read, tasks_of
from mmenvs.benchmark.differences import (
    improvement,
    paired_difference,
    pooled_spread,
    seeds_needed,
)
from mmenvs.benchmark.page import Table, Value, cell_text, markdown, page, provenance_table
from mmenvs.benchmark.plan import NAME, Plan
from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.store import MAIN, Store
from mmenvs.benchmark.suites import HARDER
from mmenvs.benchmark.summary import BASELINES, count
from mmenvs.files import out_folder, replacing

TITLE = "Benchmark"
_DIFFERENCES = (0.01, 0.02, 0.05, 0.1, 0.2)
_COMPARED = 12  # agents in the tables of pairs and in the figures
_THRESHOLDS = np.linspace(-0.1, 1.05, 47)


@dataclass(frozen=True)
class Entry:
    """An agent with its score over all tasks and its cost, for the plot of the two."""

    name: str
    score: Interval
    cost: dict[str, float | None]


def write(folder: str | os.PathLike[str], out: Path) -> None:
    """Write the report of a benchmark.

    Args:
        folder: that ``mmenvs benchmark`` wrote.
        out: folder for ``report.html``, ``report.md``, ``leaderboard.csv``, ``runs.csv`` and ``figures/``.

    Raises:
        FileNotFoundError: if there are no results.
        ValueError: if the store is damaged or holds no finished run, or ``out`` can't be written to.
    """
    folder = Path(folder)
    suite = seeds = None
    if (folder / NAME).is_file():
        plan = Plan.load(folder)
        suite, seeds = plan.the_suite().name, plan.seeds or plan.the_suite().seeds
    with Store(folder) as store:
        board = read(store, suite)
    sections = tables(board)
    drawn = figures(board)
    out_folder(out)
    for name, svg in drawn.items():
        with replacing(out / "figures" / f"{name}.svg") as file:
            file.write_text(plots.standalone(svg), encoding="utf-8")
    sentences = remarks(board, seeds)
    with replacing(out / "report.md") as file:
        lead = "\n\n".join(map(cell_text, sentences))
        paths = [f"figures/{name}.svg" for name in drawn]
        file.write_text(markdown(f"{TITLE} {board.suite}", lead, sections, paths), encoding="utf-8")
    with replacing(out / "report.html") as file:
        lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        after = episodes.section(episodes.examples(board))
        svgs = list(drawn.values())
        file.write_text(page(f"{TITLE} {board.suite}", lead, sections, svgs, after), encoding="utf-8")
    _write_csv(out / "leaderboard.csv", *_flat(_leaderboard(board)))
    _write_csv(out / "runs.csv", *_runs(board))


def remarks(board: Board, seeds: int | None = None) -> list[str]:
    """What a reader must know first; ``seeds`` is how many runs of each agent were planned."""
    runs = sum(len(records) for records in board.cells.values())
    found = [
        f"{count(runs, 'run')} of {count(len(board.agents), 'agent')} on {count(len(board.tasks), 'task')}: "
        f"{'; '.join(board.tasks)}."
    ]
    if board.failed:
        found.append(f"{count(len(board.failed), 'run')} failed, see below.")
    several = [len(records) for records in board.cells.values() if records[0].run["steps"]]
    planned = max(several, default=0) if seeds is None else seeds
    lacking = sum(max(0, planned - runs) for runs in several)
    if lacking:
        found.append(
            f"Incomplete: with {count(planned, 'seed')} of each agent on each of its tasks here, "
            f"{count(lacking, 'run')} more would be there."
        )
    undone = [task for task in tasks_of(board.suite) if task not in board.tasks]
    if undone:
        found.append(f"Incomplete: nothing was done on {'; '.join(undone)}, which the suite has.")
    if board.unranked:
        some = board.unranked[:_COMPARED]
        more = f" and {len(board.unranked) - len(some)} more" if len(board.unranked) > len(some) else ""
        found.append(
            "Without a score on every task, so not ranked, as averages over different sets of tasks "
            f"can't be compared: {'; '.join(some)}{more}."
        )
    if len({code.partition("+")[0] for code in board.codes}) > 1:
        found.append("Careful: these rows come from different versions of the code, see the last table.")
    devices = sorted({str(json.loads(origin).get("device")) for origin in board.origins})
    if len(devices) > 1:
        found.append(
            f"Careful: these rows were made on different devices, which change scores: {'; '.join(devices)}."
        )
    if board.others:
        found.append(f"The store holds other suites, left out here: {'; '.join(board.others)}.")
    return found


def tables(board: Board) -> list[Table]:
    """All tables of the report, the leaderboard first."""
    found = [_leaderboard(board), _by_tag(board)]
    found += [_criteria(board, task) for task in board.tasks]
    found += [_dropped(board, task) for task in board.tasks]
    found += [_types(board, task) for task in board.tasks]
    found += [_improvement(board), _paired(board), _power(board), _failures(board), provenance_table(
        [{"provenance": json.loads(origin)} for origin, n in board.origins.items() for _ in range(n)]
    )]  # fmt: skip
    return [found[0], *(table for table in found[1:] if table.rows)]


def figures(board: Board) -> dict[str, str]:
    """The figures as SVG by the names of their files."""
    trained = set(board.trained())
    ranked = [agent for agent in board.ranked if agent in trained][:_COMPARED]
    drawn = [agent for agent in board.agents if agent in {*ranked, *board.unranked[:_COMPARED]} & trained]
    # The ranked ones first, as there are fewer colours than agents and bars have no dashes.
    look = plots.styles([*ranked, *(agent for agent in drawn if agent not in ranked)])
    found: dict[str, str] = {}
    if ranked:
        shown = ranked[: len(plots.COLOURS)]  # bars of more can't be told apart
        values = {
            tag: [board.aggregates(agent, "test", tasks=tasks).get("mean") for agent in shown]
            for tag, tasks in board.tags.items()
        }
        by_agent = {agent: [values[tag][i] for tag in values] for i, agent in enumerate(shown)}
        profile = {
            agent: (list(_THRESHOLDS), stats.performance_profile(runs, _THRESHOLDS))
            for agent in ranked
            if (runs := board.over_tasks(agent, "test", board.tasks)) is not None
        }
        labels = ("normalised score", "share of runs above it")
        found["profiles"] = plots.curves("Performance profiles", profile, look, labels)
        efficient = {agent: line for agent in ranked if (line := _efficiency(board, agent)) is not None}
        if efficient:
            labels = ("share of the budget", "interquartile mean, test")
            found["efficiency"] = plots.curves("Sample efficiency", efficient, look, labels)
        if values:
            found["tags"] = plots.bars("By tag", list(values), by_agent, look, "normalised mean, test")
        entries = [_entry(board, agent) for agent in ranked]
        if any(entry.cost["seconds"] is not None for entry in entries):
            found["cost"] = plots.pareto("seconds", entries, look)
    for number, task in enumerate(board.tasks):
        lines = {agent: line for agent in drawn if (line := _curve(board, agent, task))}
        if lines:
            labels = ("steps of training", "return, test")
            found[f"curve_{number}"] = plots.curves(task, lines, look, labels, steps=True)
    return found


def _entry(board: Board, agent: str) -> Entry:
    score = board.aggregates(agent, "test")["mean"]
    return Entry(agent, score, {"seconds": board.cost(agent, "seconds")})


def _curve(board: Board, agent: str, task: str) -> Any:
    """Steps and the mean test return at each checkpoint, over the runs; None if they have different numbers of those."""
    points = [record.curve for record in board.cells.get((agent, task), [])]
    if len({len(curve) for curve in points}) != 1 or len(points[0]) < 2:
        return None
    # Where episodes have several steps, the rollouts before a checkpoint aren't as long in every run.
    steps = [float(np.mean([step for step, _ in reached])) for reached in zip(*points, strict=True)]
    values = [[[value] for _, value in reached] for reached in zip(*points, strict=True)]
    return steps, [stats.bootstrap([each]) for each in values]


def _efficiency(board: Board, agent: str) -> Any:
    """Share of the budget, and the interquartile mean over all tasks at each checkpoint."""
    tasks, shares = [], None
    for task, records in board.of(agent).items():
        low, high = board.floor(task, "test", "random"), board.cells["oracle", task][0].returns["test"].mean()
        assert low is not None
        tasks.append([stats.normalised([s for _, s in record.curve], low, high) for record in records])
        shares = [*records[0].run.get("checkpoints", []), 1.0]
    if not shares or {len(run) for runs in tasks for run in runs} != {len(shares)} or len(shares) < 2:
        return None
    return shares, stats.sample_efficiency(tasks)


def _leaderboard(board: Board) -> Table:
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
    names = [agent for agent in board.ranked if agent != "oracle"][:_COMPARED]
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


def _paired(board: Board) -> Table:
    trained = set(board.trained())
    ranked = [agent for agent in board.ranked if agent in trained]
    if not ranked:
        return Table("", "", ("agent",), [])
    best, *others = ranked[:_COMPARED]
    rows: list[list[Value]] = []
    alone = False
    for agent in [*others, *(name for name in BASELINES.values() if name in board.agents)]:
        row: list[Value] = [agent]
        for task in board.tasks:
            pair = [[r.returns["test"] for r in board.cells.get((name, task), [])] for name in (agent, best)]
            lengths = {len(run) for runs in pair for run in runs}
            if not all(pair) or len(lengths) != 1 or min(lengths) < 2:
                row.append(None)
                continue
            found = paired_difference(pair[0], pair[1])
            alone |= not found.over_seeds
            row.append(found.interval())
        rows.append(row)
    note = (
        f"Return on the test split less that of {best}, on identical episodes; 95 % intervals with standard errors "
        "clustered by episode and by run."
    )
    if alone:
        note += " Against an agent with a single run they speak of other episodes, not of other seeds."
    return Table(f"Differences to {best}", note, ("agent", *board.tasks), rows)


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


def _flat(table: Table) -> tuple[list[str], list[list[Any]]]:
    """A table with a column each for the bounds of intervals."""
    wide = [any(isinstance(row[i], Interval) for row in table.rows) for i in range(len(table.columns))]
    head = [
        part for name, both in zip(table.columns, wide, strict=True)
        for part in ([name, f"{name}, low", f"{name}, high"] if both else [name])
    ]  # fmt: skip
    rows = []
    for row in table.rows:
        line: list[Any] = []
        for value, both in zip(row, wide, strict=True):
            if isinstance(value, Interval):
                line += [value.value, value.low, value.high]
            else:
                line += [value, None, None] if both else [value]
        rows.append(line)
    return head, rows


def _runs(board: Board) -> tuple[list[str], list[list[Any]]]:
    """One line a run: what it was, and the return of each evaluation."""
    records = [record for group in board.cells.values() for record in group]
    names = list(dict.fromkeys(name for record in records for name in record.scores))
    costs = list(dict.fromkeys(name for record in records for name in record.cost))
    fields = ("id", "difficulty", "agent", "embedding", "seed", "steps", "episodes")
    lines = [
        [
            *(record.run[name] for name in fields),
            *(record.scores.get(name, {}).get("return") for name in names),
            *(record.cost.get(name) for name in costs),
        ]
        for record in records
    ]
    return [*fields, *names, *costs], lines


def _write_csv(path: Path, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows([[_harmless(value) for value in row] for row in rows])


def _harmless(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value
