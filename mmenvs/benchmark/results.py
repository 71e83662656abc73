"""``mmenvs report``: one HTML page, Markdown, CSV and SVG of a benchmark's store."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mmenvs.benchmark import episodes, plots, stats
from mmenvs.benchmark.board import Board, read, tasks_of
from mmenvs.benchmark.page import Table, cell_text, markdown, page
from mmenvs.benchmark.plan import NAME, Plan
from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.store import Store
from mmenvs.benchmark.summary import count
from mmenvs.benchmark.tables import COMPARED, leaderboard, tables
from mmenvs.files import out_folder, replacing

TITLE = "Benchmark"
FILES = ("report.md", "report.html", "leaderboard.csv", "runs.csv")  # in the order in which they are written
_THRESHOLDS = np.linspace(-0.1, 1.05, 47)


@dataclass(frozen=True)
class Entry:
    """An agent with its score over all tasks and its cost, for the plot of the two."""

    name: str
    score: Interval
    cost: dict[str, float | None]


def write(folder: str | os.PathLike[str], out: Path) -> list[str]:
    """Write the report of a benchmark.

    Args:
        folder: that ``mmenvs benchmark`` wrote.
        out: folder for ``report.html``, ``report.md``, ``leaderboard.csv``, ``runs.csv`` and ``figures/``.

    Returns:
        What was written into ``out``.

    Raises:
        FileNotFoundError: if there are no results.
        ValueError: if the store is damaged or holds no finished run, or ``out`` can't be written to or holds
            the report of something else.
    """
    folder = Path(folder)
    _check_ours(out)
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
    with replacing(out / FILES[0]) as file:
        lead = "\n\n".join(map(cell_text, sentences))
        paths = [f"figures/{name}.svg" for name in drawn]
        file.write_text(markdown(f"{TITLE} {board.suite}", lead, sections, paths), encoding="utf-8")
    with replacing(out / FILES[1]) as file:
        lead = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
        after = episodes.section(episodes.examples(board))
        svgs = list(drawn.values())
        file.write_text(page(f"{TITLE} {board.suite}", lead, sections, svgs, after), encoding="utf-8")
    _write_csv(out / FILES[2], *_flat(leaderboard(board)))
    _write_csv(out / FILES[3], *_runs(board))
    return sorted(["figures", *FILES])


def _trained_longer(board: Board, agent: str) -> str | None:
    """The agent and the first task on which it did many more steps than it had, as rollouts are played to their end."""
    for task, records in board.of(agent).items():
        done, asked = max(record.curve[-1][0] for record in records), records[0].run["steps"]
        if 4 * done > 5 * asked > 0:
            return f"{agent} on {task} ({done:,} steps in place of {asked:,})"
    return None


def _check_ours(out: Path) -> None:
    """That no files of something else would be written over."""
    path = out / FILES[0]
    if path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(f"# {TITLE} "):
        return
    for name in FILES:
        if (out / name).exists():
            raise ValueError(f"out={str(out)!r} holds a {name} of something else: choose another folder")


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
        some = board.unranked[:COMPARED]
        more = f" and {len(board.unranked) - len(some)} more" if len(board.unranked) > len(some) else ""
        found.append(
            "Without a score on every task, so not ranked, as averages over different sets of tasks "
            f"can't be compared: {'; '.join(some)}{more}."
        )
    trained = [agent for agent in board.ranked if agent in board.trained()]
    short = [agent for agent in trained if _scores_by_share(board, agent) is None]
    if 0 < len(short) < len(trained):
        found.append(
            f"Without a score at every checkpoint of the suite, which few steps leave out, and so without a line under "
            f"Sample efficiency: {'; '.join(short)}."
        )
    longer = [said for agent in board.trained() if (said := _trained_longer(board, agent)) is not None]
    if longer:
        found.append(f"Trained over a quarter longer than asked for: {'; '.join(longer)}.")
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


def figures(board: Board) -> dict[str, str]:
    """The figures as SVG by the names of their files."""
    trained = set(board.trained())
    ranked = [agent for agent in board.ranked if agent in trained][:COMPARED]
    drawn = [agent for agent in board.agents if agent in {*ranked, *board.unranked[:COMPARED]} & trained]
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
    if len({len(curve) for curve in points}) != 1:
        return None
    # Where episodes have several steps, the rollouts before a checkpoint aren't as long in every run.
    steps = [float(np.mean([step for step, _ in reached])) for reached in zip(*points, strict=True)]
    values = [[[value] for _, value in reached] for reached in zip(*points, strict=True)]
    return steps, [stats.bootstrap([each]) for each in values]


def _efficiency(board: Board, agent: str) -> Any:
    """Share of the budget, and the interquartile mean over all tasks at each checkpoint; None without all of them."""
    found = _scores_by_share(board, agent)
    return None if found is None else (found[0], stats.sample_efficiency(found[1]))


def _scores_by_share(board: Board, agent: str) -> Any:
    """The shares of the budget at which an agent was scored, and for each task and run the normalised scores there."""
    tasks, shares = [], None
    for task, records in board.of(agent).items():
        low, high = board.floor(task, "test", "random"), board.cells["oracle", task][0].returns["test"].mean()
        assert low is not None
        tasks.append([stats.normalised([s for _, s in record.curve], low, high) for record in records])
        shares = [*records[0].run.get("checkpoints", []), 1.0]
    if not shares or {len(run) for runs in tasks for run in runs} != {len(shares)} or len(shares) < 2:
        return None
    return shares, tasks


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
