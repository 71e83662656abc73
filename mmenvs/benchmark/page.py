"""What all reports are made of: tables, as Markdown and within one HTML page that loads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.stats import Interval

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


def provenance_table(rows: Sequence[Row]) -> Table:
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


def markdown(title: str, lead: str, sections: Sequence[Table], figures: Sequence[str] = ()) -> str:
    """A report as Markdown.

    Args:
        title: of the page.
        lead: Markdown below it.
        sections: their cells are escaped.
        figures: addresses of pictures that stand after the first section.
    """
    lines = [f"# {cell_text(title)}", "", lead]
    for number, table in enumerate(sections):
        if number == 1 and figures:
            lines += ["", *(f"![figure]({figure})" for figure in figures)]
        lines += ["", f"## {cell_text(table.title)}", ""]
        lines += [cell_text(table.note), ""] if table.note else []
        lines += ["| " + " | ".join(cell_text(column.split(": ")[-1]) for column in table.columns) + " |"]
        right = ["---" if isinstance(value, str) else "---:" for value in table.rows[0]]
        lines += ["|" + "|".join(right) + "|"]
        lines += ["| " + " | ".join(cell_text(show(value)) for value in row) + " |" for row in table.rows]
    return "\n".join(lines) + "\n"


def cell_text(text: str) -> str:
    """Text that can't leave its cell of a Markdown table or bring HTML with it."""
    text = escape(" ".join(text.split()), quote=False)
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")


def page(title: str, lead: str, sections: Sequence[Table], figures: Sequence[str], after: str = "") -> str:
    """A report as one HTML page that loads nothing.

    Args:
        title: of the page.
        lead: HTML below it.
        sections: tables; their columns sort by a click.
        figures: SVG, shown below the first table.
        after: HTML that follows the first table and the figures.
    """
    drawn = "".join(f"<figure>{svg}</figure>" for svg in figures)
    head, *rest = [_html(table) for table in sections]
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:; media-src data:\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n"
        f'{head}\n<div class="figures">{drawn}</div>\n{after}'
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
.episode img { width: 100%; height: auto; border-bottom: 4px solid #b23; } .episode.right img { border-color: #2a7d46; }
audio, video { width: 100%; margin-top: 6px; } figcaption { font-size: 13px; color: #555; }
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
