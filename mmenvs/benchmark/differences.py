"""Two agents beside each other: how often one is better, by how much, and how many seeds it takes to see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from mmenvs.benchmark.stats import RESAMPLES, Array, Interval, Tasks, interval_from, resampled

_PAIRS = 2**22


def probability_of_improvement(
    first: Tasks, second: Tasks, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """How probably a run of ``first`` scores above one of ``second`` on the same task, mean over tasks.

    The Mann-Whitney statistic (Mann and Whitney 1947) as in Agarwal et al. 2021; a tie counts half.

    Args:
        first, second: as for :func:`mmenvs.benchmark.stats.bootstrap`, the same tasks in the same order.
        resamples, seed: of the stratified bootstrap.

    Raises:
        ValueError: for another number of tasks.
    """
    if len(first) != len(second):
        raise ValueError(f"both must have the same tasks, got {len(first)} and {len(second)}")
    # Draws of the other agent are its own: the same ones would tie seeds that have nothing in common.
    return improvement(resampled(first, resamples, seed), resampled(second, resamples, seed + 1))


def improvement(
    first: tuple[Sequence[Array], Sequence[Array]], second: tuple[Sequence[Array], Sequence[Array]]
) -> Interval:
    """:func:`probability_of_improvement` of what :func:`mmenvs.benchmark.stats.resampled` gives of each."""
    value = float(np.mean([_wins(a, b) for a, b in zip(first[0], second[0], strict=True)]))
    draws = np.mean([_wins_of_draws(a, b) for a, b in zip(first[1], second[1], strict=True)], 0)
    return interval_from(value, draws, 0.95)


def _wins(first: Array, second: Array) -> Array:
    """Share of pairs in which the first is higher, ``(..., n)`` and ``(..., m)`` to ``(...)``."""
    a, b = first[..., :, None], second[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def _wins_of_draws(first: Array, second: Array) -> Array:
    """The same a few draws at a time: every pair of runs of all draws at once may not fit into memory."""
    few = max(1, _PAIRS // (first.shape[1] * second.shape[1]))
    return np.concatenate([_wins(first[i : i + few], second[i : i + few]) for i in range(0, len(first), few)])


@dataclass(frozen=True)
class Difference:
    """Mean difference of two agents on identical episodes.

    Attributes:
        value: mean of the first minus mean of the second.
        error: its standard error.
        low, high: 95 % interval by Student's t.
        over_seeds: whether it speaks of what other seeds would do; with a single run of either agent it
            speaks of other episodes alone.
    """

    value: float
    error: float
    low: float
    high: float
    over_seeds: bool

    def interval(self) -> Interval:
        """Value and bounds as the tables show them."""
        return Interval(self.value, self.low, self.high)


def paired_difference(first: npt.ArrayLike, second: npt.ArrayLike) -> Difference:
    """How much more the first agent scores, with a standard error clustered both by episode and by run.

    Runs of an agent play the same episodes, so neither scores of one episode nor scores of one run are
    independent. The variance is that of clusters of episodes plus that of clusters of runs less that of
    single scores, which both contain (Cameron, Gelbach and Miller 2011, "Robust inference with multiway
    clustering"), and never less than either of the two. Degrees of freedom are Satterthwaite's (1946).

    Args:
        first, second: scores ``(runs, episodes)``, column for column of the same episode.

    Raises:
        ValueError: for other shapes, other numbers of episodes or fewer than 2 of them.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or a.shape[1] < 2 or not len(a) * len(b):
        raise ValueError(
            "first and second must be (runs, episodes) of the same 2 or more episodes, "
            f"got shapes {a.shape} and {b.shape}"
        )
    episodes = a.shape[1]
    parts = [(a - a.mean()) / a.size, -(b - b.mean()) / b.size]  # what each score adds to the difference
    by_episode = episodes / (episodes - 1) * float(((parts[0].sum(0) + parts[1].sum(0)) ** 2).sum())
    over_seeds = len(a) > 1 and len(b) > 1
    variance, freedom = by_episode, float(episodes - 1)
    if over_seeds:
        by_run = sum(len(part) / (len(part) - 1) * float((part.sum(1) ** 2).sum()) for part in parts)
        single = sum(float((part**2).sum()) for part in parts)
        variance = max(by_episode + by_run - single, by_episode, by_run)
        shares = by_episode**2 / (episodes - 1) + by_run**2 / (len(a) + len(b) - 2)
        freedom = min(variance**2 / shares, float(episodes - 1)) if shares else freedom
    value, error = float(a.mean() - b.mean()), math.sqrt(variance)
    half = t_quantile(0.975, freedom) * error
    return Difference(value, error, value - half, value + half, over_seeds)


def t_quantile(p: float, freedom: float) -> float:
    """Quantile of Student's t for p from 0.5 up to 1, by x = sqrt(freedom) tan(angle), which bounds the integral."""
    if freedom < 1:
        raise ValueError(f"freedom must be at least 1, got {freedom}")
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(float(np.interp(2 * p - 1, area / area[-1], angles)))


def seeds_needed(
    difference: float, deviation: float, *, power: float = 0.8, significance: float = 0.05
) -> int:
    """Seeds that each of two agents needs so that a difference of their means is seen.

    n = 2 (z_{1 - a/2} + z_{power})^2 (s / d)^2 + z_{1 - a/2}^2 / 4, rounded up, at least 2: the normal
    approximation with Guenther's correction (1981) for the two-sided t-test.

    Args:
        difference: d, of the means.
        deviation: s, standard deviation over seeds.
        power: how probably it is seen.
        significance: a, how probably one is seen where there is none.
    """
    if not difference > 0 or not deviation >= 0:
        raise ValueError(
            f"difference must be above 0 and deviation at least 0, got {difference} and {deviation}"
        )
    normal = NormalDist()
    z = normal.inv_cdf(1 - significance / 2)
    return max(2, math.ceil(2 * (z + normal.inv_cdf(power)) ** 2 * (deviation / difference) ** 2 + z**2 / 4))


def pooled_spread(groups: Sequence[Sequence[float]]) -> float | None:
    """Standard deviation within groups, pooled; None if none has two values."""
    wide = [np.asarray(group, np.float64) for group in groups if len(group) > 1]
    if not wide:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in wide)
    return math.sqrt(squares / sum(len(group) - 1 for group in wide))
