"""Means and intervals over runs and episodes, drawn from a seeded generator.

After Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice": runs are
drawn again with replacement within each task (the strata), so that every task counts alike in each draw.
Here episodes are drawn again too, as a run is scored on a sample of them only: the same ones for all runs of a task,
which play the same episodes (Owen 2007, "The pigeonhole bootstrap").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mmenvs.checks import integer_in

Array = npt.NDArray[np.float64]
# For each task its runs (one a seed), for each run the scores of its episodes.
Tasks = Sequence[Sequence[npt.ArrayLike]]
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


def mean_of_tasks(tasks: Sequence[Array]) -> Array:
    """Mean over tasks of their mean over runs: every task counts alike, also where one has more runs.

    Like the other statistics of several tasks it takes ``(..., runs)`` for each of them, and gives ``(...)``.
    """
    return mean(np.stack([runs.mean(-1) for runs in tasks], -1))


def median_of_tasks(tasks: Sequence[Array]) -> Array:
    """Median over tasks of their mean over runs."""
    return np.asarray(np.median(np.stack([runs.mean(-1) for runs in tasks], -1), -1))


def interquartile_mean_of_tasks(tasks: Sequence[Array]) -> Array:
    """Interquartile mean of all runs of all tasks together."""
    return interquartile_mean(np.concatenate(tasks, -1))


def optimality_gap(tasks: Sequence[Array]) -> Array:
    """How far the runs stay below 1, mean over tasks; what lies above 1 makes up for nothing."""
    return mean_of_tasks([np.maximum(1 - runs, 0) for runs in tasks])


# The aggregates of Agarwal et al. 2021, by the names of the reports.
AGGREGATES: dict[str, Callable[[Sequence[Array]], Array]] = {
    "interquartile mean": interquartile_mean_of_tasks,
    "mean": mean_of_tasks,
    "median": median_of_tasks,
    "optimality gap": optimality_gap,
}


def normalised(scores: npt.ArrayLike, low: float, high: float) -> Array:
    """(score - low) / (high - low): 0 where ``low`` is, 1 where ``high`` is; not clipped.

    With the random agent and the oracle as bounds it is the share of what there is to win, with the best blind
    agent and the oracle the share of what takes more than one modality.

    Raises:
        ValueError: if ``high`` isn't above ``low``.
    """
    if not high > low:
        raise ValueError(f"high must be above low={low}, got {high}")
    return (np.asarray(scores, np.float64) - low) / (high - low)


def check_same_tasks(scores: Mapping[str, Mapping[str, object]]) -> tuple[str, ...]:
    """The tasks that all agents have, if they all have the same.

    Args:
        scores: by agent, then by task.

    Raises:
        ValueError: if one lacks a task that another has: averages over different sets of tasks can't be
            compared.
    """
    tasks = tuple(dict.fromkeys(task for of_agent in scores.values() for task in of_agent))
    for agent, of_agent in scores.items():
        lacks = [task for task in tasks if task not in of_agent]
        if lacks:
            raise ValueError(
                f"averages over different sets of tasks can't be compared: {agent} lacks {'; '.join(lacks)}"
            )
    return tasks


def aggregates(tasks: Tasks, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """All of ``AGGREGATES`` from the same draws; arguments as for :func:`bootstrap`."""
    values, draws = resampled(tasks, resamples, seed)
    return {
        name: interval_from(float(statistic(values)), statistic(draws), 0.95)
        for name, statistic in AGGREGATES.items()
    }


def aggregate(
    tasks: Tasks, statistic: Callable[[Sequence[Array]], Array], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """One of ``AGGREGATES``, or another statistic of several tasks, with its bootstrap interval.

    Args:
        tasks, resamples, seed: as for :func:`bootstrap`.
        statistic: from ``(..., runs)`` for each task to ``(...)``.
    """
    edges = np.cumsum([len(runs) for runs in tasks])[:-1]
    return bootstrap(
        tasks, lambda flat: statistic(np.split(flat, edges, axis=-1)), resamples=resamples, seed=seed
    )


def performance_profile(
    tasks: Tasks, thresholds: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """The share of runs whose score is above each threshold, every task counting alike.

    Args:
        tasks, resamples, seed: as for :func:`bootstrap`; the scores should be normalised.
        thresholds: ``(n,)``.
    """
    levels = np.asarray(thresholds, np.float64)
    values, draws = resampled(tasks, resamples, seed)
    exact = [mean_of_tasks([(runs > level) * 1.0 for runs in values]) for level in levels]
    drawn = [mean_of_tasks([(runs > level) * 1.0 for runs in draws]) for level in levels]
    return [interval_from(float(value), shares, 0.95) for value, shares in zip(exact, drawn, strict=True)]


def sample_efficiency(
    tasks: Sequence[Sequence[npt.ArrayLike]],
    statistic: Callable[[Sequence[Array]], Array] = interquartile_mean_of_tasks,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """A statistic of all tasks at each checkpoint, with its bootstrap interval over the runs.

    Args:
        tasks: for each task its runs, for each run its score at each checkpoint, ``(checkpoints,)``, the same
            number for all.
        statistic: from ``(..., runs)`` for each task to ``(...)``.
        resamples, seed: as for :func:`bootstrap`.
    """
    points = {np.shape(run) for runs in tasks for run in runs}
    if len(points) != 1 or len(next(iter(points))) != 1:
        raise ValueError(f"all runs must have the same checkpoints, got shapes {sorted(points)}")
    (count,) = next(iter(points))
    return [
        aggregate([[[run[k]] for run in runs] for runs in map(np.asarray, tasks)], statistic,
                  resamples=resamples, seed=seed)
        for k in range(count)
    ]  # fmt: skip


def bootstrap(
    tasks: Tasks,
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
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence!r}")
    values, draws = resampled(tasks, resamples, seed)
    value = float(statistic(np.concatenate(values)))
    return interval_from(value, statistic(np.concatenate(draws, 1)), confidence)


def resampled(tasks: Tasks, resamples: int, seed: int) -> tuple[list[Array], list[Array]]:
    """For each task the mean scores of its runs, ``(runs,)``, and those of the draws, ``(resamples, runs)``."""
    integer_in("resamples", resamples, 1, 10**6)
    if not tasks or not all(len(runs) for runs in tasks):
        raise ValueError("tasks must hold at least one task, each with at least one run")
    values, draws = [], []
    for number, runs in enumerate(tasks):
        episodes = [_episodes(run) for run in runs]
        values.append(np.array([run.mean() for run in episodes]))
        means = np.stack(
            [_counts(run.size, resamples, seed, number) @ run / run.size for run in episodes], -1
        )
        generator = np.random.default_rng([seed, number, 0])
        chosen = generator.integers(len(episodes), size=(resamples, len(episodes)))
        draws.append(np.take_along_axis(means, chosen, 1))
    return values, draws


def interval_from(value: float, draws: Array, confidence: float) -> Interval:
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, min(float(low), value), max(float(high), value))


def spread(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 below the line); None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _episodes(run: Any) -> Array:
    scores = np.asarray(run, np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"a run must hold finite scores of episodes, (n,), got shape {scores.shape}")
    return scores


@lru_cache(maxsize=12)  # a suite's tasks; 8 MB each with 1,000 episodes
def _counts(episodes: int, resamples: int, seed: int, task: int) -> npt.NDArray[np.float32]:
    """How often each episode of a task is in each draw with replacement, ``(resamples, episodes)``."""
    chosen = np.random.default_rng([seed, task, 1]).integers(episodes, size=(resamples, episodes))
    chosen += np.arange(resamples)[:, None] * episodes
    counts = np.bincount(chosen.ravel(), minlength=chosen.size)
    return counts.reshape(chosen.shape).astype(np.float32)
