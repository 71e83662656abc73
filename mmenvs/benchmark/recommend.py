"""Which embedding to take: the best one that a budget allows."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mmenvs.benchmark import rows as store
from mmenvs.benchmark.rows import Row
from mmenvs.benchmark.stats import Interval
from mmenvs.benchmark.summary import BASELINES, BUDGETS, Candidate, count, summarise


@dataclass(frozen=True)
class Recommendation:
    """What to take, as text in ``str()``.

    Attributes:
        chosen: the configuration; with ``within`` False the one that is nearest to the budget.
        within: whether it is within the budget.
        budget: as it was asked for.
        tied: the names of those within the budget whose intervals overlap that of the best, best first.
        candidates: all configurations, best first.
        incomplete: the names of configurations that were left out, as they lack a score on some task.
        unbeaten: ``"random"`` or ``"most_frequent"`` if the interval of no configuration that could be taken
            lies above that of this baseline, else None; random goes first. None too without baselines.
    """

    chosen: Candidate
    within: bool
    budget: dict[str, float]
    tied: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    incomplete: tuple[str, ...]
    unbeaten: str | None

    @property
    def embedding(self) -> str:
        """Such as ``"shapes+cross_attention"``."""
        return self.chosen.embedding

    @property
    def score(self) -> Interval:
        """Mean over the tasks of the test return, 0 to 1."""
        return self.chosen.score

    def __str__(self) -> str:
        limits = " and ".join(_amount(key, value) for key, value in self.budget.items())
        score = self.chosen.score
        what = f"{self.chosen.label}, {score}"
        verdict = f"; none is better than {BASELINES[self.unbeaten]}" if self.unbeaten else ""
        if not self.within:
            has = ", ".join(
                f"unknown {BUDGETS[key]}" if cost is None else _amount(key, cost)
                for key, cost in ((key, self.chosen.cost[key]) for key in self.budget)
            )
            return f"nothing is within {limits}; the nearest is {what} ({has}){verdict}"
        sentence = f"within {limits}: {what}" if self.budget else f"without a budget: {what}"
        others = [name for name in self.tied if name != self.chosen.name]
        if others:
            sentence += f" (not to be told apart by score: {'; '.join(others)}; the cheaper one is named)"
        return sentence + verdict


def recommend(
    results: str | os.PathLike[str] | Iterable[Row], budget: Mapping[str, float] | None = None
) -> Recommendation:
    """The configuration with the best mean test score among those within ``budget``.

    Where the 95 % interval of another one overlaps that of the best, the two can't be told apart by their
    scores; then the cheaper one is taken: the one whose largest share of the budget is smaller, or without
    a budget the one with the shorter latency. If any lies above the baselines (random, most frequent), only
    those that do are taken; if none does, the recommendation says so.

    Args:
        results: the folder that ``mmenvs compare`` wrote, its ``rows.jsonl``, or the rows.
        budget: upper bounds of some of ``"megabytes"`` (of weights), ``"milliseconds"`` (for one observation),
            ``"seconds"`` (of training one run) and ``"parameters"``. A configuration must keep them on every
            task.

    Raises:
        TypeError: for a budget that is no mapping.
        ValueError: for a budget of another name or not above 0; without a configuration that has a score on
            every task.
        FileNotFoundError: if there are no results.
    """
    limits = check_budget({} if budget is None else budget)
    if isinstance(results, str | os.PathLike):
        rows = store.read(Path(results))
    elif not isinstance(results, Iterable):
        raise TypeError(f"results must be a folder, rows.jsonl or its rows, got {results!r}")
    else:
        rows = [store.check(row) for row in results]
    summary = summarise(rows)
    candidates = summary.candidates
    if not candidates:
        raise ValueError(
            f"no configuration has a score on all of {'; '.join(summary.tasks)}: {count(len(summary.failed), 'run')} failed"
        )
    allowed = [candidate for candidate in candidates if _share(candidate, limits) <= 1]
    unbeaten = None
    for name in ("most_frequent", "random"):
        bar = summary.baseline_scores.get(name)
        if bar is None:
            continue
        above = [candidate for candidate in allowed or candidates if candidate.score.low > bar.high]
        if not above:
            unbeaten = name
        elif allowed:
            allowed = above
    if not allowed:
        chosen = min(candidates, key=lambda c: (_share(c, limits), -c.score.value, c.name))
    else:
        tied = [candidate for candidate in allowed if candidate.score.high >= allowed[0].score.low]
        chosen = min(tied, key=lambda c: (_price(c, limits), -c.score.value, c.name))
    return Recommendation(
        chosen=chosen,
        within=bool(allowed),
        budget=limits,
        tied=tuple(candidate.name for candidate in tied) if allowed else (),
        candidates=tuple(candidates),
        incomplete=tuple(summary.incomplete),
        unbeaten=unbeaten,
    )


def check_budget(budget: Mapping[str, float]) -> dict[str, float]:
    """The budget as floats.

    Raises:
        TypeError: if it isn't a mapping.
        ValueError: for an unknown name, or an amount that isn't a finite number above 0.
    """
    if not isinstance(budget, Mapping):
        raise TypeError(f"budget must be a mapping such as {{'megabytes': 20}}, got {budget!r}")
    for key, value in budget.items():
        if key not in BUDGETS:
            raise ValueError(f"budget must name some of {', '.join(BUDGETS)}, got {key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"budget[{key!r}] must be a number above 0, got {value!r}")
    return {key: float(value) for key, value in budget.items()}


def _share(candidate: Candidate, limits: Mapping[str, float]) -> float:
    """The largest part of its limit that a cost takes; infinite for a cost that wasn't measured."""
    shares = [0.0]
    for key, limit in limits.items():
        cost = candidate.cost[key]
        shares.append(math.inf if cost is None else cost / limit)
    return max(shares)


def _price(candidate: Candidate, limits: Mapping[str, float]) -> float:
    latency = candidate.cost["milliseconds"]
    return _share(candidate, limits) if limits else math.inf if latency is None else latency


def _amount(key: str, value: float) -> str:
    number = f"{value:,.0f}" if value >= 1000 or float(value).is_integer() else f"{value:.3g}"
    return f"{number} {BUDGETS[key]}"
