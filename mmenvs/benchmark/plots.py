"""The figures of the report, as SVG to stand inside a page: same data, same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmenvs.benchmark.summary import Candidate, Cell

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

    def draw(axes: Any) -> None:
        for cell in cells:
            colour, dash, _ = look[cell.configuration]
            steps = [step for step, _ in cell.curve]
            points = [point for _, point in cell.curve]
            axes.plot(
                steps, [p.value for p in points], color=colour, linestyle=dash, label=cell.configuration
            )
            axes.fill_between(
                steps,
                [p.low for p in points],
                [p.high for p in points],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
        axes.set(xlabel="steps of training", ylabel="return, training episodes", title=task)
        axes.ticklabel_format(axis="x", style="plain")
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_major_locator(_few_ticks())

    return _svg(draw, f"curve {task}", len(cells))


def pareto(key: str, candidates: Sequence[Candidate], look: dict[str, Style]) -> str:
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

            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set(
            xlabel=COSTS[key], ylabel="mean test score", title=f"Score against {COSTS[key].split(',')[0]}"
        )

    return _svg(draw, f"pareto {key}", len(candidates))


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
