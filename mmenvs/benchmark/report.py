"""The report of a comparison: one self-contained HTML page, and the same tables as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from mmenvs.benchmark import plots
from mmenvs.benchmark.page import Table, Value, cell_text, markdown, page, provenance_table
from mmenvs.benchmark.recommend import recommend
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.structure import measures
from mmenvs.benchmark.summary import BASELINES, Cell, Summary, count, few_episodes, summarise
from mmenvs.files import replacing

TITLE = "Comparison of embeddings"
SPLITS = ("test", "compositional")


def write(rows: Sequence[Row], out: Path, budget: Mapping[str, float] | None = None) -> None:
    """Write ``report.html`` and ``report.md`` into ``out``.

    Args:
        rows: of ``mmenvs compare``, at least one.
        out: folder that exists.
        budget: for the recommendation.
    """
    summary = summarise(rows)
    sentence = (
        str(recommend(rows, budget)) if summary.candidates else "no configuration has a score on every task"
    )
    sections = tables(summary)
    with replacing(out / "report.md") as file:
        lead = f"**Recommendation:** {cell_text(sentence)}"
        file.write_text(markdown(TITLE, lead, sections), encoding="utf-8")
    runs = sum(len(cell.rows) for cell in summary.cells.values())
    lead = (
        f"<p>{count(runs, 'run')} of {count(len(summary.configurations), 'configuration')} "
        f"on {count(len(summary.tasks), 'task')}.</p>\n"
        f'<p class="recommendation"><b>Recommendation:</b> {escape(sentence)}</p>'
    )
    with replacing(out / "report.html") as file:
        file.write_text(page(TITLE, lead, sections, figures(summary)), encoding="utf-8")


def tables(summary: Summary) -> list[Table]:
    """All tables of the report."""
    shown = [task for task in summary.tasks if summary.of_task(task)]
    found = [_ranking(summary)] if summary.candidates else []
    for task in shown:
        found += [_criteria(task, summary), _efficiency(task, summary.of_task(task))]
    for task in shown:
        cells = summary.of_task(task)
        found.append(_perturbations(task, cells))
        found.append(_structure(task, cells))
    found.append(_encoders(summary))
    if summary.failed:
        found.append(_failures(summary.failed))
    found.append(provenance_table([row for cell in summary.cells.values() for row in cell.rows]))
    return [table for table in found if table.rows]


def figures(summary: Summary) -> list[str]:
    """Pareto plots and learning curves, as SVG."""
    look = plots.styles(summary.configurations)
    candidates = summary.candidates
    drawn = [
        plots.pareto(key, candidates, look)
        for key in plots.COSTS
        if any(candidate.cost[key] is not None for candidate in candidates)
    ]
    curves = {task: [cell for cell in summary.of_task(task) if cell.curve] for task in summary.tasks}
    return drawn + [plots.learning_curves(task, cells, look) for task, cells in curves.items() if cells]


def _ranking(summary: Summary) -> Table:
    note = f"Mean test return over {count(len(summary.tasks), 'task')}, brought to 0 to 1; 95 % intervals over seeds and episodes."
    if summary.incomplete:
        note += f" Without a score on every task, so not ranked: {'; '.join(summary.incomplete)}."
    columns = ("embedding", "mean", "interquartile mean", "MB", "ms", "s of training", "parameters")
    rows: list[list[Value]] = [
        [
            c.label,
            c.score,
            c.iqm,
            c.cost["megabytes"],
            c.cost["milliseconds"],
            c.cost["seconds"],
            c.cost["parameters"],
        ]
        for c in summary.candidates
    ]
    for name, score in summary.baseline_scores.items():
        rows.append([BASELINES[name], score, *[None] * (len(columns) - 2)])
    if any(c.defaults for c in summary.candidates):
        note += " Default encoders: no observation of that task has the encoder that is named."
    return Table("Ranking", note, columns, rows)


def _criteria(task: str, summary: Summary) -> Table:
    cells = summary.of_task(task)
    baselines = _baselines(task, summary)
    threshold = summary.threshold(task)
    columns: dict[str, Callable[[Cell], Value]] = {
        "embedding": lambda c: c.configuration,
        "seeds": lambda c: len(c.rows),
        "reward: return, test": lambda c: c.reward("test"),
        "reward: success, test": lambda c: c.success("test"),
        "reward: return, compositional": lambda c: c.reward("compositional"),
        "reward: success, compositional": lambda c: c.success("compositional"),
        "reward: area under curve": lambda c: c.area,
        "reward: steps to 80 %": lambda c: c.steps_to(threshold),
        "length: steps an episode": lambda c: c.length,
        "stability: over seeds": lambda c: c.seed_spread,
        "stability: over checkpoints": lambda c: c.checkpoint_spread,
        "stability: lost when perturbed": lambda c: c.drop,
    }
    note = f"Steps to 80 %: until the learning curve reaches {threshold:.3f}; – means never."
    if baselines:
        note += " The last rows are agents that learn nothing, on the same episodes."
    if all(cell.length == 1 for cell in cells):
        del columns["length: steps an episode"]
        note += " Every episode is one step long."
    if all(
        row["scores"][split]["success"] == row["scores"][split]["return"]
        for cell in [*cells, *baselines]
        for row in cell.rows
        for split in SPLITS
    ):
        for split in SPLITS:
            del columns[f"reward: success, {split}"]
        note += " Return and success are the same here."
    rows = [[column(cell) for column in columns.values()] for cell in cells]
    # They have no training: neither seeds nor a curve.
    scored = {name for name in columns if name.startswith(("reward: return", "reward: success", "length"))}
    for cell in baselines:
        scores = [column(cell) if name in scored else None for name, column in columns.items()]
        rows.append([BASELINES[cell.configuration], *scores[1:]])
    return Table(f"Reward, episode length and stability: {task}", note, tuple(columns), rows)


def _efficiency(task: str, cells: Sequence[Cell]) -> Table:
    columns: dict[str, Callable[[Cell], Value]] = {
        "embedding": lambda c: c.configuration,
        "embedding: parameters": lambda c: c.cost("parameters"),
        "embedding: MFLOP": lambda c: c.cost("megaflops"),
        "embedding: ms": lambda c: c.cost("milliseconds"),
        "embedding: observations / s": lambda c: c.cost("throughput"),
        "embedding: peak MB": lambda c: c.cost("peak_megabytes"),
        "embedding: cache, kB each": lambda c: c.cost("cache_kilobytes"),
        "training: s": lambda c: c.cost("seconds"),
        "training: CPU s": lambda c: c.cost("cpu_seconds"),
    }
    rows = [[column(cell) for column in columns.values()] for cell in cells]
    return Table(f"Computational efficiency: {task}", "Medians over the seeds.", tuple(columns), rows)


def _baselines(task: str, summary: Summary) -> list[Cell]:
    return [summary.baselines[task, name] for name in BASELINES if (task, name) in summary.baselines]


def _perturbations(task: str, cells: Sequence[Cell]) -> Table:
    names = list(dict.fromkeys(name for cell in cells for name in cell.perturbed))
    note = "Mean test return with perturbed observations, beside that on the same episodes without."
    rows: list[list[Value]] = [
        [
            cell.configuration,
            sum(few_episodes(len(run)) for run in cell.returns("test")),
            *(cell.perturbed.get(name) for name in names),
        ]
        for cell in cells
    ]
    columns = ("embedding", "episodes", *(name.replace("_", " ") for name in names))
    return Table(f"Perturbed observations: {task}", note, columns, rows if len(names) > 1 else [])


def _structure(task: str, cells: Sequence[Cell]) -> Table:
    """Mean over the runs of each number that the probes gave."""
    means = {cell.configuration: measures([row.get("structure") for row in cell.rows]) for cell in cells}
    # There are more measures than embeddings: they stand below each other.
    names = dict.fromkeys(name for values in means.values() for name in values)
    rows: list[list[Value]] = [[name, *(values.get(name) for values in means.values())] for name in names]
    note = "On held-out data; what each measure is stands in docs/compare.md."
    return Table(f"Structure within and between modalities: {task}", note, ("measure", *means), rows)


def _encoders(summary: Summary) -> Table:
    rows: list[list[Value]] = []
    for cell in summary.cells.values():
        chosen = cell.rows[0].get("plan", {}).get("encoders", {})
        text = ", ".join(f"{name}: {encoder}" for name, encoder in chosen.items())
        rows.append([cell.configuration, cell.task, text])
    note = "Of every observation, the defaults too."
    return Table("Encoders", note, ("embedding", "task", "encoders"), rows)


def _failures(failed: Sequence[Row]) -> Table:
    rows: list[list[Value]] = [
        [
            row["run"]["embedding"],
            row["run"]["id"],
            row["run"]["agent"],
            row["run"]["seed"],
            str(row["error"]),
        ]
        for row in failed
    ]
    note = "The same command tries them again."
    return Table("Runs that failed", note, ("embedding", "id", "agent", "seed", "error"), rows)
