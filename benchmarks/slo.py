"""Owns what a service level objective is, and the search for the highest request rate that still meets one.

Knows no server: the caller tries a rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.load import latencies

PERCENT = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """For 90 % of the requests that are sent: the most ms to the first token, and from each to the next; None: any."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read "ttft=500,itl=50", in ms.

        Raises:
            ValueError: it does not have that form.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in ("ttft", "itl") or name in limits:
                raise ValueError(f"slo must look like ttft=500,itl=50 (ms, each once), got {text!r}")
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = math.nan
            if not 0 < limits[name] < math.inf:
                raise ValueError(f"slo: {name} must be a number of ms above 0, got {value!r}")
        return cls(ttft_ms=limits.get("ttft"), itl_ms=limits.get("itl"))

    def is_met_by(self, report: Mapping[str, Any]) -> bool:
        """Is guidellm's report of a load within every limit? A request that failed, or still waited at the end, missed
        them all."""
        limits = {"ttft_ms": self.ttft_ms, "itl_ms": self.itl_ms}
        return all(
            percentile(latencies(report, metric), PERCENT) <= limit
            for metric, limit in limits.items()
            if limit is not None
        )


def highest_rate(meets: Callable[[float], bool], *, first: float, rounds: int) -> float:
    """The highest rate that `meets` was seen to allow, 0 if none: doubled from `first` until it fails, then bisected.

    `meets` is called `rounds` times. It may err now and then, as measurements do: the result is a rate that it allowed.
    """
    lowest_missed = math.inf
    best, rate = 0.0, first
    for _ in range(rounds):
        if meets(rate):
            best = rate
        else:
            lowest_missed = rate
        rate = 2 * best if math.isinf(lowest_missed) else (best + lowest_missed) / 2
    return best


def percentile(values: list[float], percent: float) -> float:
    """The smallest of the values that this percentage of them does not exceed; infinite if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.inf
