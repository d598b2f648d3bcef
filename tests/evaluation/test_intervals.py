"""Intervals are those of the percentile bootstrap, by seed, and differences are paired."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.intervals import Measure, bootstrap


def mean_of(values: np.ndarray) -> Measure:
    return lambda rows: {"mean": float(values[rows].mean())}


def test_the_interval_of_a_mean_is_about_that_of_its_standard_error() -> None:
    values = np.random.default_rng(3).normal(0.5, 0.2, 400)
    draws = bootstrap({"run": mean_of(values)}, 400, resamples=4000, seed=0)
    estimate = draws["run"].estimates(0.95)["mean"]
    error = values.std() / 400**0.5
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert estimate.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    narrow = draws["run"].estimates(0.5)["mean"]
    assert estimate.low < narrow.low < narrow.high < estimate.high


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    values = np.arange(20.0)
    one, again, other = (
        bootstrap({"run": mean_of(values)}, 20, resamples=200, seed=seed)["run"].estimates(0.95) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_a_difference_is_taken_on_the_same_samples() -> None:
    """A run that is a little better on every sample is so in every draw, however much samples differ."""
    values = np.random.default_rng(0).normal(0, 10, 50)
    draws = bootstrap({"a": mean_of(values), "b": mean_of(values + 0.1)}, 50, resamples=500, seed=0)
    difference = draws["b"].minus(draws["a"], 0.95)["mean"]
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert difference.excludes_zero
    a, b = (draws[run].estimates(0.95)["mean"] for run in "ab")
    assert b.low < a.high  # each interval alone would not show it
    assert not draws["a"].minus(draws["a"], 0.95)["mean"].excludes_zero
