"""The figures of the report, as SVG to stand inside a page: same data, same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.summary import Cell

# Okabe and Ito 2008: told apart also by the colour-blind. Further lines are dashed.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5a5a5a")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*X"
COSTS = {
    "milliseconds": "latency of one observation, ms",
    "megabytes": "weights, MB",
    "seconds": "training, s",
}
Style = tuple[str, str, str]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Colour, line and marker of each configuration, the same in every figure."""
    n = len(COLOURS)
    return {
        name: (COLOURS[i % n], DASHES[i // n % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(names)
    }


def learning_curves(task: str, cells: Sequence[Cell], look: dict[str, Style]) -> str:
    """Return of the training episodes over the steps of training, with intervals over the seeds."""
    lines = {
        cell.configuration: ([step for step, _ in cell.curve], [point for _, point in cell.curve])
        for cell in cells
    }
    return curves(task, lines, look, ("steps of training", "return, training episodes"), steps=True)


def curves(
    title: str,
    lines: Mapping[str, tuple[Sequence[float], Sequence[Interval]]],
    look: dict[str, Style],
    labels: tuple[str, str],
    *,
    steps: bool = False,
) -> str:
    """A line with the band of its intervals for each name; ``steps`` are written in thousands."""

    def draw(axes: Any) -> None:
        for name, (at, points) in lines.items():
            colour, dash, _ = look[name]
            # One point alone makes no line.
            marker = "o" if len(points) == 1 else ""
            axes.plot(at, [p.value for p in points], color=colour, linestyle=dash, marker=marker, label=name)
            low, high = [p.low for p in points], [p.high for p in points]
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel=labels[0], ylabel=labels[1], title=title)
        if steps:
            axes.ticklabel_format(axis="x", style="plain")
            axes.xaxis.set_major_formatter(_thousands)
            axes.xaxis.set_major_locator(_few_ticks())

    return _svg(draw, f"curve {title}", len(lines))


def bars(
    title: str,
    groups: Sequence[str],
    values: Mapping[str, Sequence[Interval | None]],
    look: dict[str, Style],
    label: str,
) -> str:
    """For each group a bar with its interval of every name that has one there."""

    def draw(axes: Any) -> None:
        height = 0.8 / len(values)
        for i, (name, points) in enumerate(values.items()):
            known = [(at, p) for at, p in enumerate(points) if p is not None]
            axes.barh(
                [at + (i + 0.5) * height - 0.4 for at, _ in known],
                [p.value for _, p in known],
                height,
                xerr=[[p.value - p.low for _, p in known], [p.high - p.value for _, p in known]],
                color=look[name][0],
                error_kw={"linewidth": 0.8},
                label=name,
            )
        axes.set_yticks(range(len(groups)), groups)
        axes.invert_yaxis()
        axes.set(xlabel=label, title=title)

    return _svg(draw, f"bars {title}", len(values) + len(groups))


class Costed(Protocol):
    """Something with a score and what it costs."""

    @property
    def name(self) -> str: ...
    @property
    def score(self) -> Interval: ...
    @property
    def cost(self) -> Mapping[str, float | None]: ...


def pareto(key: str, candidates: Sequence[Costed], look: dict[str, Style]) -> str:
    """Mean score over one of the costs; the grey line joins those that nothing cheaper equals."""

    def draw(axes: Any) -> None:
        known = [(cost, c) for c in candidates if (cost := c.cost[key]) is not None]
        best, front = float("-inf"), []
        for cost, candidate in sorted(known, key=lambda pair: (pair[0], -pair[1].score.value)):
            if candidate.score.value > best:
                best = candidate.score.value
                front.append((cost, best))
        axes.plot(*zip(*front, strict=True), color="#b0b0b0", drawstyle="steps-post", zorder=1)
        for cost, candidate in known:
            colour, _, marker = look[candidate.name]
            score = candidate.score
            axes.errorbar(
                [cost],
                [score.value],
                [[score.value - score.low], [score.high - score.value]],
                color=colour,
                marker=marker,
                linestyle="none",
                capsize=3,
                label=candidate.name,
            )
        low, high = min(cost for cost, _ in known), max(cost for cost, _ in known)
        if low > 0 and high > 3 * low:
            axes.set_xscale("log")
            from matplotlib.ticker import LogLocator, NullFormatter

            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(
            xlabel=COSTS[key], ylabel="mean test score", title=f"Score against {COSTS[key].split(',')[0]}"
        )

    return _svg(draw, f"pareto {key}", len(candidates))


def standalone(svg: str) -> str:
    """A figure as a file of its own, with the names of the namespaces that a page needs not."""
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return svg.replace("<svg", f"<svg {names}", 1) + "\n"


def _svg(draw: Callable[[Any], None], name: str, entries: int) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    # Ids must differ between the figures of a page and not between two runs: the salt is the figure's name.
    settings: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.8, 3.1 + 0.21 * entries), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside lower center", frameon=False, fontsize=9)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML an SVG needs no names of namespaces, and the page then holds no address at all.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    # Groups have names that are the same in every figure, and nothing refers to them.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    return re.sub(r' width="[^"]*pt"| height="[^"]*pt"', "", svg, count=2).strip()


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(4)


def _thousands(value: float, _: Any) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"
