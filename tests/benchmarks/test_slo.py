"""The search for the highest rate that meets an objective, and what it takes to meet one."""

from __future__ import annotations

import pytest

from benchmarks.slo import Slo, highest_rate, percentile
from tests.benchmarks.reports import report


@pytest.mark.parametrize("threshold", [0.3, 2.0, 7.7, 100.0])
@pytest.mark.parametrize("first", [0.5, 4.0, 30.0])
def test_the_search_closes_in_on_the_rate_at_which_latency_passes_the_limit(threshold: float, first: float) -> None:
    """A queue's latency grows without bound towards its capacity."""
    capacity, asked = 1.25 * threshold, []

    def meets(rate: float) -> bool:
        asked.append(rate)
        return rate < capacity and 10 / (1 - rate / capacity) <= 50 + 1e-9

    assert highest_rate(meets, first=first, rounds=16) == pytest.approx(threshold, rel=0.01)
    assert len(asked) == 16


def test_a_limit_that_nothing_meets_gives_no_rate() -> None:
    assert highest_rate(lambda rate: False, first=1, rounds=4) == 0


def test_only_a_rate_that_met_the_limit_is_named() -> None:
    asked = []
    best = highest_rate(lambda rate: not asked.append(rate) and rate <= 5, first=1, rounds=6)  # type: ignore[func-returns-value]
    assert best in asked
    assert asked[:4] == [1, 2, 4, 8]


@pytest.mark.parametrize(("text", "slo"), [
    ("ttft=500,itl=50", Slo(ttft_ms=500, itl_ms=50)),
    ("itl=12.5", Slo(itl_ms=12.5)),
])  # fmt: skip
def test_an_objective_is_read(text: str, slo: Slo) -> None:
    assert Slo.parse(text) == slo


@pytest.mark.parametrize("text", ["", "500", "ttft", "ttft=fast", "total=3", "ttft=1,ttft=2", "ttft=0", "itl=nan"])
def test_an_objective_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="slo"):
        Slo.parse(text)


def test_nine_of_ten_must_keep_within_every_limit() -> None:
    nine = report(ttft_ms=[100.0] * 9 + [900.0], itl_ms=[10.0] * 10)
    assert Slo(ttft_ms=100, itl_ms=10).is_met_by(nine)
    assert not Slo(ttft_ms=99, itl_ms=10).is_met_by(nine)
    assert not Slo(ttft_ms=100, itl_ms=9).is_met_by(nine)
    assert not Slo(ttft_ms=100).is_met_by(report(ttft_ms=[100.0] * 8 + [900.0] * 2, itl_ms=[10.0] * 10))


def test_what_failed_or_waited_in_vain_has_missed_the_objective() -> None:
    """Else an overloaded server, which answers few, would look fast."""
    assert Slo(ttft_ms=100).is_met_by(report(ttft_ms=[50.0] * 9, itl_ms=[5.0] * 9, failed=1))
    assert not Slo(ttft_ms=100).is_met_by(report(ttft_ms=[50.0] * 8, itl_ms=[5.0] * 8, failed=2))
    assert not Slo(ttft_ms=100).is_met_by(report(ttft_ms=[50.0] * 8, itl_ms=[5.0] * 8, unfinished=[None, None]))
    assert Slo(ttft_ms=100).is_met_by(report(ttft_ms=[50.0] * 8, itl_ms=[5.0] * 8, unfinished=[50.0, 50.0]))


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(10, 0, -1)]
    assert [percentile(values, percent) for percent in (0, 10, 11, 50, 90, 91, 100)] == [1, 1, 2, 5, 9, 10, 10]
    assert percentile([], 90) == float("inf")
