"""Owns how sure a score is: bootstrap intervals of runs on the same samples, and of their differences.

Knows no metric. The method is the percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapter 13): samples are drawn again with replacement, and the interval is of the quantiles of what is measured on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llama2.progress import progress

Rows = NDArray[np.int64]
# The metrics of the samples at these rows.
Measure = Callable[[Rows], Mapping[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What was measured on all samples, and the interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Each metric on all samples, and on every draw of them."""

    values: Mapping[str, float]
    drawn: Mapping[str, NDArray[np.float64]]

    def estimates(self, confidence: float) -> dict[str, Estimate]:
        return {name: _estimate(value, self.drawn[name], confidence) for name, value in self.values.items()}

    def minus(self, other: Draws, confidence: float) -> dict[str, Estimate]:
        """The differences to a run of the same bootstrap: draw by draw, since both ran on the same samples."""
        return {
            name: _estimate(value - other.values[name], self.drawn[name] - other.drawn[name], confidence)
            for name, value in self.values.items()
        }


def bootstrap(measures: Mapping[str, Measure], samples: int, *, resamples: int, seed: int) -> dict[str, Draws]:
    """The draws of each run, which are the same rows for all runs.

    Args:
        measures: by run; all are of the same `samples`.
        resamples: how often so many samples are drawn.
        seed: the same seed draws the same.
    """
    rng = np.random.default_rng(seed)
    rows = rng.integers(samples, size=(resamples, samples))
    every: dict[str, Draws] = {}
    with progress(total=len(measures) * resamples, desc="bootstrap", delay=2) as bar:
        for run, measure in measures.items():
            drawn = []
            for chosen in rows:
                drawn.append(measure(chosen))
                bar.update()
            values = measure(np.arange(samples))
            every[run] = Draws(values=values, drawn={name: np.array([one[name] for one in drawn]) for name in values})
    return every


def _estimate(value: float, drawn: NDArray[np.float64], confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value=float(value), low=float(low), high=float(high))
