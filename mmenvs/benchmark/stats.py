"""Means and intervals over runs and episodes, drawn from a seeded generator.

After Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice": runs are
drawn again with replacement within each task (the strata), so that every task counts alike in each draw.
Here the episodes of each drawn run are drawn again too, as a run is scored on a sample of episodes only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmenvs.checks import integer_in

Array = npt.NDArray[np.float64]
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A statistic with the bounds of its bootstrap interval.

    Attributes:
        value: of the data themselves.
        low, high: quantiles of the draws, widened to ``value`` where that lies outside.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def mean(scores: Array) -> Array:
    """Mean over the last axis."""
    return scores.mean(-1)


def interquartile_mean(scores: Array) -> Array:
    """Mean of the middle half over the last axis: a quarter, rounded down, is left out at either end."""
    n = scores.shape[-1]
    cut = n // 4
    return np.sort(scores, -1)[..., cut : n - cut].mean(-1)


def bootstrap(
    tasks: Sequence[Sequence[npt.ArrayLike]],
    statistic: Callable[[Array], Array] = mean,
    *,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A statistic over all runs of all tasks, and its percentile interval by the stratified bootstrap.

    Args:
        tasks: for each task the runs (one a seed), for each run the scores of its episodes, ``(n,)``.
        statistic: from the mean scores of the runs, ``(..., number of runs)``, to ``(...)``:
            :func:`mean` or :func:`interquartile_mean`.
        resamples: number of draws.
        confidence: share of the draws within the interval.
        seed: of the draws; the same data and seed give the same interval.

    With a single run a task, the interval tells of the episodes alone, not of what another seed would do.

    Raises:
        ValueError: for a task without runs or a run without episodes.
    """
    integer_in("resamples", resamples, 1, 10**6)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    if not tasks or not all(tasks):
        raise ValueError("tasks must hold at least one task, each with at least one run")
    generator = np.random.default_rng(seed)
    values: list[float] = []
    draws = []
    for runs in tasks:
        episodes = [_episodes(run) for run in runs]
        values += [float(run.mean()) for run in episodes]
        chosen = generator.integers(len(episodes), size=(resamples, len(episodes)))
        drawn = np.empty(chosen.shape)
        for i, run in enumerate(episodes):
            at = chosen == i
            drawn[at] = _resampled_means(run, int(at.sum()), generator)
        draws.append(drawn)
    value = float(statistic(np.array(values)))
    low, high = np.quantile(statistic(np.concatenate(draws, 1)), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 below the line); None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _episodes(run: Any) -> Array:
    scores = np.asarray(run, np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"a run must hold finite scores of episodes, (n,), got shape {scores.shape}")
    return scores


def _resampled_means(run: Array, count: int, generator: np.random.Generator) -> Array:
    """Means of ``count`` draws of a run's episodes with replacement, ``(count,)``."""
    # How often each distinct score is drawn is all it takes: two numbers for tasks with right and wrong.
    scores, counts = np.unique(run, return_counts=True)
    return generator.multinomial(run.size, counts / run.size, size=count) @ scores / run.size
