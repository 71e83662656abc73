"""Statistics of the benchmark against numbers computed by hand, and against rliable."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student

from mmenvs.benchmark import stats
from mmenvs.benchmark.differences import (
    paired_difference,
    pooled_spread,
    probability_of_improvement,
    seeds_needed,
    t_quantile,
)

# Two tasks with four runs each.
SCORES = [[0.0, 0.2, 0.4, 1.0], [0.1, 0.3, 0.5, 1.3]]
TASKS = [[[score] for score in runs] for runs in SCORES]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", 0.475),  # (0.4 + 0.55) / 2
        ("median", 0.475),
        ("interquartile mean", 0.35),  # (0.2 + 0.3 + 0.4 + 0.5) / 4
        ("optimality gap", 0.5625),  # (1 + 0.8 + 0.6 + 0 + 0.9 + 0.7 + 0.5 + 0) / 8
    ],
)
def test_aggregates_by_hand(name, value):
    found = stats.aggregate(TASKS, stats.AGGREGATES[name])
    assert found.value == pytest.approx(value)
    assert found.low < value < found.high
    assert found == stats.aggregate(TASKS, stats.AGGREGATES[name])


def test_draws_depend_on_the_seed():
    first, second = (stats.resampled(TASKS, 50, seed)[1] for seed in (0, 1))
    assert not np.array_equal(first[0], second[0])
    assert not np.array_equal(first[0], first[1])


def test_intervals_of_runs_that_play_the_same_episodes_cover_the_truth():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        run = generator.random(100) < 0.5  # the seeds have learned the same, so more of them tell nothing new
        found = stats.bootstrap([[run, run, run]], resamples=400)
        covered += found.low <= 0.5 <= found.high
    assert covered / 200 >= 0.9


def test_median_is_over_tasks():
    three = [*TASKS, [[0.0]] * 4]
    assert stats.aggregate(three, stats.median_of_tasks).value == pytest.approx(0.4)


def test_every_task_counts_alike():
    uneven = [[[1.0]], [[0.0]] * 9]
    assert stats.aggregate(uneven, stats.mean_of_tasks).value == 0.5
    assert [point.value for point in stats.performance_profile(uneven, [0.5])] == [0.5]


def test_bootstrap_interval_has_the_known_width():
    runs = np.random.default_rng(0).standard_normal(400)
    found = stats.aggregate([[[x] for x in runs]], stats.mean_of_tasks, resamples=4000)
    half = 1.96 * runs.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)


def test_profile_by_hand():
    points = stats.performance_profile(TASKS, [-1, 0, 0.25, 0.4, 2])
    assert [point.value for point in points] == [1.0, 0.875, 0.625, 0.5 - 0.125, 0.0]
    assert all(point.low <= point.value <= point.high for point in points)


def test_sample_efficiency_is_the_aggregate_at_each_checkpoint():
    rising = [[np.array([0.5, 1.0]) * score for score in runs] for runs in SCORES]
    half, full = stats.sample_efficiency(rising)
    assert (half.value, full.value) == pytest.approx((0.175, 0.35))
    with pytest.raises(ValueError, match="same checkpoints"):
        stats.sample_efficiency([[[0.1, 0.2], [0.1]]])


def test_normalised():
    assert stats.normalised([0.25, 0.5, 1.0], 0.25, 0.75).tolist() == [0.0, 0.5, 1.5]
    with pytest.raises(ValueError, match="above low"):
        stats.normalised([1], 1, 1)


def test_different_sets_of_tasks_are_refused():
    assert stats.check_same_tasks({"a": {"x": 1, "y": 2}, "b": {"y": 0, "x": 0}}) == ("x", "y")
    with pytest.raises(ValueError, match="b lacks y"):
        stats.check_same_tasks({"a": {"x": 1, "y": 2}, "b": {"x": 1}})


def test_probability_of_improvement_by_hand():
    first, second = [[[1.0], [3.0]], [[1.0]]], [[[0.0], [2.0], [3.0]], [[1.0]]]
    # Of six pairs 1 > 0, 3 > 0 and 3 > 2 are won and 3 = 3 is tied: 3.5 / 6. The other task is a tie.
    found = probability_of_improvement(first, second)
    assert found.value == pytest.approx((3.5 / 6 + 0.5) / 2)
    swapped = probability_of_improvement(second, first)
    assert swapped.value == pytest.approx(1 - found.value)
    with pytest.raises(ValueError, match="same tasks"):
        probability_of_improvement(first, second[:1])


def test_against_rliable():
    metrics = pytest.importorskip("rliable.metrics", reason="rliable, of the extra test, is not installed")
    library = pytest.importorskip("rliable.library", reason="rliable, of the extra test, is not installed")
    generator = np.random.default_rng(0)
    x, y = generator.random((2, 10, 5))  # (runs, tasks)
    ours = [[[score] for score in runs] for runs in x.T]
    others = [[[score] for score in runs] for runs in y.T]
    for name, function in {
        "interquartile mean": metrics.aggregate_iqm,
        "mean": metrics.aggregate_mean,
        "median": metrics.aggregate_median,
        "optimality gap": metrics.aggregate_optimality_gap,
    }.items():
        found = stats.aggregate(ours, stats.AGGREGATES[name], resamples=4000)
        assert found.value == pytest.approx(float(function(x)))
        _, intervals = library.get_interval_estimates(
            {"a": x}, lambda s, f=function: np.array([f(s)]), reps=4000
        )
        width = float(intervals["a"][1, 0] - intervals["a"][0, 0])
        assert found.high - found.low == pytest.approx(width, rel=0.1)
    levels = np.linspace(0, 1, 11)
    profile = stats.performance_profile(ours, levels)
    assert [point.value for point in profile] == pytest.approx(
        [library.run_score_deviation(x, level) for level in levels]
    )
    found = probability_of_improvement(ours, others)
    assert found.value == pytest.approx(float(metrics.probability_of_improvement(x, y)))


def test_paired_difference_of_single_runs_is_the_paired_test():
    a, b = np.array([[1.0, 0, 1, 1]]), np.array([[0.0, 0, 1, 0]])
    found = paired_difference(a, b)
    d = np.array([1.0, 0, 0, 1])
    error = d.std(ddof=1) / 2
    assert (found.value, found.error) == pytest.approx((0.5, error))
    assert found.high - found.value == pytest.approx(student.ppf(0.975, 3) * error)
    assert not found.over_seeds


def test_paired_difference_by_hand():
    a, b = np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 0.0], [0.5, 0.0]])
    found = paired_difference(a, b)
    # What is left of the means 0.75 and 0.125, over 4 scores each: a [[.25, -.75], [.25, .25]] / 4,
    # b -[[-.125, -.125], [.375, -.125]] / 4.
    pa, pb = np.array([[1, -3], [1, 1]]) / 16, -np.array([[-0.5, -0.5], [1.5, -0.5]]) / 16
    by_episode = 2 * ((2 - 1) ** 2 + (-2 + 1) ** 2) / 256
    by_run = 2 * (2**2 + 2**2 + 1**2 + 1**2) / 256
    single = float((pa**2).sum() + (pb**2).sum())
    variance = max(by_episode + by_run - single, by_run)
    assert found.value == pytest.approx(0.625)
    assert found.error == pytest.approx(math.sqrt(variance))
    assert found.over_seeds


def test_paired_difference_covers_the_truth():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        episodes = generator.normal(0, 1, 40)
        runs = [generator.normal(mean, 0.3, (4, 1)) + episodes + generator.normal(0, 0.5, (4, 40))
                for mean in (0.2, 0.0)]  # fmt: skip
        found = paired_difference(*runs)
        covered += found.low <= 0.2 <= found.high
    assert 0.92 <= covered / 300 <= 1


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (3,)), ((1, 1), (1, 1)), ((0, 3), (1, 3))])
def test_paired_difference_refuses(shapes):
    with pytest.raises(ValueError, match="same 2 or more episodes"):
        paired_difference(*map(np.zeros, shapes))


@given(st.floats(1, 500), st.floats(0.6, 0.995))
def test_quantiles_of_student(freedom, p):
    assert t_quantile(p, freedom) == pytest.approx(student.ppf(p, freedom), rel=1e-4)


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 64), (1.0, 17), (0.2, 394), (100.0, 2)])
def test_seeds_needed_against_tables_of_the_t_test(effect, seeds):
    # Cohen 1988, two-sided, alpha 0.05, power 0.80: 64, 17 and 394 each.
    assert seeds_needed(effect * 0.3, 0.3) == seeds
    with pytest.raises(ValueError, match="above 0"):
        seeds_needed(0, 1)


def test_pooled_spread():
    assert pooled_spread([[1, 3], [0, 0, 3], [7]]) == pytest.approx(math.sqrt((2 + 6) / 3))
    assert pooled_spread([[1], [2]]) is None
