"""The report of a comparison: one self-contained HTML page, and the same tables as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from mmenvs.benchmark import plots
from mmenvs.benchmark.recommend import recommend
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.structure import measures
from mmenvs.benchmark.summary import BASELINES, Cell, Summary, count, few_episodes, summarise
from mmenvs.files import replacing

SPLITS = ("test", "compositional")
Value = float | int | str | Interval | None


@dataclass(frozen=True)
class Table:
    """A table whose first column names the row.

    Attributes:
        title: heading.
        note: what the reader should know, below the heading.
        columns: their names; those with ``"group: name"`` stand under a common head.
        rows: as many values as there are columns.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[list[Value]]


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
        file.write_text(markdown(sentence, sections), encoding="utf-8")
    with replacing(out / "report.html") as file:
        file.write_text(page(sentence, sections, figures(summary), summary), encoding="utf-8")


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
    found.append(_provenance([row for cell in summary.cells.values() for row in cell.rows]))
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


def _provenance(rows: Sequence[Row]) -> Table:
    """One line for each distinct origin, so that a mixture shows."""
    groups: dict[str, int] = {}
    for row in rows:
        key = json.dumps(row.get("provenance", {}), sort_keys=True)
        groups[key] = groups.get(key, 0) + 1
    origins = [(json.loads(key), count) for key, count in groups.items()]
    names = list(dict.fromkeys(name for origin, _ in origins for name in origin))
    lines: list[list[Value]] = [
        [count, *(_text(origin.get(name, "")) for name in names)] for origin, count in origins
    ]
    mixed = len({json.dumps([o.get("versions"), o.get("commit")]) for o, _ in origins}) > 1
    note = "Careful: these rows come from different versions of the code." if mixed else ""
    return Table("Where the rows come from", note, ("runs", *names), lines)


def _text(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def show(value: Value) -> str:
    """A value as the tables show it."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, Interval):
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
    if float(value).is_integer() or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"


def markdown(sentence: str, sections: Sequence[Table]) -> str:
    """The report as Markdown."""
    lines = ["# Comparison of embeddings", "", f"**Recommendation:** {_cell(sentence)}"]
    for table in sections:
        lines += ["", f"## {_cell(table.title)}", ""]
        lines += [_cell(table.note), ""] if table.note else []
        lines += ["| " + " | ".join(_cell(column.split(": ")[-1]) for column in table.columns) + " |"]
        right = ["---" if isinstance(value, str) else "---:" for value in table.rows[0]]
        lines += ["|" + "|".join(right) + "|"]
        lines += ["| " + " | ".join(_cell(show(value)) for value in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that can't leave its cell of a Markdown table or bring HTML with it."""
    text = escape(" ".join(text.split()), quote=False)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")


def page(sentence: str, sections: Sequence[Table], drawn: Sequence[str], summary: Summary) -> str:
    """The report as one HTML page that loads nothing."""
    runs = sum(len(cell.rows) for cell in summary.cells.values())
    figures = "".join(f"<figure>{svg}</figure>" for svg in drawn)
    head, *rest = [_html(table) for table in sections]
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>Comparison of embeddings</title><style>{_STYLE}</style></head><body><main>\n"
        f"<h1>Comparison of embeddings</h1>\n"
        f"<p>{count(runs, 'run')} of {count(len(summary.configurations), 'configuration')} "
        f"on {count(len(summary.tasks), 'task')}.</p>\n"
        f'<p class="recommendation"><b>Recommendation:</b> {escape(sentence)}</p>\n'
        f'{head}\n<div class="figures">{figures}</div>\n'
        + "\n".join(rest)
        + f"\n</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _html(table: Table) -> str:
    groups = [column.partition(": ")[0] if ": " in column else "" for column in table.columns]
    heads = ""
    if any(groups):
        heads, i = "<tr>", 0
        while i < len(groups):
            span = next((j for j in range(i, len(groups)) if groups[j] != groups[i]), len(groups)) - i
            heads += f'<td class="group" colspan="{span}">{escape(groups[i])}</td>'
            i += span
        heads += "</tr>"
    names = "".join(
        f'<th scope="col"><button type="button">{escape(column.split(": ")[-1])}</button></th>'
        for column in table.columns
    )
    body = "".join(
        "<tr>" + "".join(_td(value, first=i == 0) for i, value in enumerate(row)) + "</tr>\n"
        for row in table.rows
    )
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return (
        f'<section><h2>{escape(table.title)}</h2>{note}<div class="scroll"><table>'
        f"<thead>{heads}<tr>{names}</tr></thead>\n<tbody>{body}</tbody></table></div></section>"
    )


def _td(value: Value, *, first: bool) -> str:
    """A cell; ``data-value`` holds the number in full, which the columns are sorted by."""
    tag = 'th scope="row"' if first else "td"
    if isinstance(value, str):
        return f'<{tag} class="text">{escape(value)}</{tag.split()[0]}>'
    number = value.value if isinstance(value, Interval) else value
    exact = "" if number is None else f' data-value="{number!r}"'
    text = escape(show(value))
    if isinstance(value, Interval):
        text = f"{value.value:.3f} <small>[{value.low:.3f}, {value.high:.3f}]</small>"
    return f"<{tag}{exact}>{text}</{tag.split()[0]}>"


_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1c1c1c; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 16px; }
h1 { font-size: 24px; margin: 8px 0; } h2 { font-size: 18px; margin: 32px 0 4px; }
section p { margin: 0 0 8px; color: #555; }
.recommendation { border-left: 4px solid #0072b2; background: #f1f6fa; padding: 10px 14px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 16px; margin-top: 24px; }
figure { margin: 0; } figure svg { width: 100%; max-width: 520px; height: auto; }
.scroll { overflow: auto; max-height: 640px; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
.text { text-align: left; } td.text { white-space: normal; min-width: 120px; max-width: 420px; overflow-wrap: anywhere; }
thead tr:last-child > * { position: sticky; top: 0; z-index: 1; background: #fff; } thead th { vertical-align: bottom; white-space: normal; } thead th:first-child { text-align: left; }
.group { text-align: center; font-weight: 600; color: #0072b2; border-bottom: 1px solid #ddd; }
th[scope=row] { position: sticky; left: 0; background: #fff; font-weight: 600; }
@media (max-width: 700px) { th[scope=row] { max-width: 42vw; white-space: normal; } }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
small { color: #666; } tbody tr:hover > * { background: #f6f9fb; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.onclick = () => {
  const head = button.parentNode, table = head.closest("table"), body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") !== "descending", at = head.cellIndex;
  for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = row => { const c = row.cells[at]; return "value" in c.dataset ? +c.dataset.value : c.textContent; };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? 1 : -1;
  body.append(...[...body.rows].sort((a, b) => order(value(a), value(b)) * (down ? -1 : 1)));
};
"""
