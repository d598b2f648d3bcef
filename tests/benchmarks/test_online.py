"""From guidellm's report to a row of the table, a price, and the cost of the front; no server is started here."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from benchmarks import front, online
from benchmarks.load import (
    LoadError,
    Target,
    Work,
    dollars_per_1k_tokens,
    guidellm_percentiles,
    offer,
    read_report,
)
from tests.benchmarks.reports import report

TEN = report(ttft_ms=[float(index) for index in range(10, 110, 10)], itl_ms=[5.0] * 10, failed=1, unfinished=[None])


def test_a_report_becomes_figures() -> None:
    load = read_report(TEN, rate=3.0, dollars_per_hour=3.6)
    assert (load.clients, load.offered_per_s, load.answered, load.failed, load.unfinished) == (None, 3.0, 10, 1, 1)
    assert load.sent_per_s == pytest.approx(2.0), "twelve requests, half a second apart"
    assert load.ttft_ms == {"p50": 60, "p90": 100, "p99": 100}
    assert load.itl_ms == {"p50": 5, "p90": 5, "p99": 5}
    assert load.total_ms["p50"] == pytest.approx(60 + 7 * 5), "seconds have become ms"
    duration = 4.5 + 0.135
    assert load.answered_per_s == pytest.approx(10 / duration)
    assert load.tokens_per_s == pytest.approx(80 / duration)
    assert load.dollars_per_1k_tokens == pytest.approx(0.001 / (80 / duration) * 1000)


def test_a_load_without_an_answer_has_no_latencies_and_no_price() -> None:
    load = read_report(report(ttft_ms=[], itl_ms=[], failed=3), clients=4, dollars_per_hour=1.0)
    assert (load.ttft_ms, load.answered_per_s, load.dollars_per_1k_tokens, load.failed) == ({}, 0, None, 3)
    row = online.as_text({"loads": [as_row(clients=4, one=report(ttft_ms=[], itl_ms=[], failed=3))]}).splitlines()[1]
    assert row.split() == ["4", "clients", "0.00", "0.0", *["-"] * 9, "3", "0", "-"]


def test_tokens_are_priced_by_the_hour() -> None:
    """3.81 dollars an hour at 1,000 tokens a second are a thousandth of 3.81 / 3.6."""
    assert dollars_per_1k_tokens(3.81, 1000) == pytest.approx(3.81 / 3600)
    assert dollars_per_1k_tokens(None, 1000) is None
    assert dollars_per_1k_tokens(3.81, 0) is None


def test_guidellms_own_percentiles_are_kept_in_its_units() -> None:
    kept = guidellm_percentiles(TEN)
    assert kept["time_to_first_token_ms"]["p90"] == 100
    assert kept["request_latency"]["p50"] == pytest.approx(0.095)
    assert guidellm_percentiles(report(ttft_ms=[], itl_ms=[])) == {}


def as_row(one: dict[str, Any], **asked: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(read_report(one, dollars_per_hour=3.6, **asked)), "guidellm": {}}


def test_the_table_has_a_row_for_each_load_with_offered_and_answered_apart() -> None:
    figures: dict[str, Any] = {
        "loads": [as_row(TEN, clients=8), as_row(TEN, rate=2.5)],
        "slo": {"ttft_ms": 500.0, "itl_ms": None, "highest_rate_per_s": 2.5},
    }
    header, clients, rate, *rest = online.as_text(figures).splitlines()
    assert header.split()[:3] == ["offered", "answered/s", "tokens/s"]
    assert " ".join(clients.split()) == "8 clients 2.16 17.3 60 100 100 5 5 5 95 135 135 1 1 0.05794"
    assert rate.split()[:2] == ["2.5/s", "2.16"]
    assert "p90 of ttft <= 500 ms: up to 2.50 requests/s" in rest


def test_the_front_is_compared_with_the_best_of_the_engine_alone() -> None:
    alone = [{"tokens_per_s": 20.0, "ttft_ms": 45.0}, {"tokens_per_s": 16.0, "ttft_ms": 40.0}]
    load = read_report(TEN, clients=32)
    cost = front.front_cost(alone, load, load, {"engine": 1.5, "java": 0.25})
    assert cost["ratio_to_engine"] == pytest.approx(load.tokens_per_s / 20)
    assert cost["added_ttft_ms"] == pytest.approx(60 - 40)
    *_, ratio, cores = online.as_text({"loads": [], "front": cost}).splitlines()
    assert ratio.startswith(f"the front: {load.tokens_per_s / 20:.3f} of the engine's tokens/s at 32 clients")
    assert cores == "processors busy meanwhile: engine 1.50, java 0.25; together 1.75"


def test_a_front_that_answered_nobody_has_no_time_to_first_token() -> None:
    nothing = read_report(report(ttft_ms=[], itl_ms=[], unfinished=[None] * 32), clients=32)
    cost = front.front_cost([{"tokens_per_s": 20.0, "ttft_ms": 45.0}], nothing, nothing, {})
    text = online.as_text({"loads": [], "front": cost})
    assert "the front: 0.000 of the engine's tokens/s" in text
    assert "- ms to the first token of one" in text


@pytest.mark.parametrize("rows", [[as_row(TEN, clients=8)], [as_row(TEN, clients=8), as_row(TEN, rate=2.5)]])
def test_the_plot_shows_whatever_was_measured(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert online.plot(rows, tmp_path / "online.png").read_bytes().startswith(b"\x89PNG")


TARGET = Target(url="http://127.0.0.1:1/predictions/llama/1.0", key="secret", model="llama", tokenizer=Path("."))
WORK = Work(prompt_tokens=32, output_tokens=8, requests=20, seconds=7)


def program(path: Path, script: str) -> Path:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize(("asked", "profile"), [
    ({"clients": 4}, "kind=concurrent,streams=4"), ({"rate": 2.5}, "kind=poisson,rate=2.5"),
])  # fmt: skip
def test_guidellm_is_asked_for_the_load(asked: dict[str, Any], profile: str, tmp_path: Path) -> None:
    """A program in its place records its arguments and writes a report."""
    (tmp_path / "report.json").write_text(json.dumps(TEN))
    script = (
        f'echo "$@" > {tmp_path}/asked; for last; do :; done; cp {tmp_path}/report.json "${{last#kind=json,path=}}"'
    )
    assert offer(TARGET, WORK, **asked, seed=5, guidellm=program(tmp_path / "guidellm", script)) == TEN
    words = (tmp_path / "asked").read_text()
    assert f"--profile {profile} " in words
    for option in ("prompt_tokens=32,output_tokens=8", "max_requests,count=20", "max_duration,seconds=7", "value=5"):
        assert option in words


def test_a_missing_guidellm_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"make \.venv-clients/\.ready"):
        online.benchmark(guidellm=str(tmp_path / "guidellm"))


def test_what_a_failed_guidellm_said_is_shown(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="no such server"):
        offer(
            TARGET, WORK, clients=1, seed=1, guidellm=program(tmp_path / "guidellm", "echo no such server >&2; exit 3")
        )


@pytest.mark.parametrize(("changes", "message"), [
    ({"url": "http://127.0.0.1:1", "key": "k", "front_cost": True}, "front_cost"),
    ({"url": "http://127.0.0.1:1"}, "url and key"),
    ({"slo": "ttft"}, "slo"),
])  # fmt: skip
def test_a_mistake_is_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        online.benchmark(**changes)


@pytest.mark.parametrize(("late", "loads"), [([0.0], 1), ([30.0, 30.0, 0.1], 3)])
def test_a_load_that_came_late_is_made_again(late: list[float], loads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests planned over many seconds would come in a burst."""
    reports = [report(ttft_ms=[1.0] * 5, itl_ms=[1.0] * 5, late=one) for one in late]
    seeds: list[int] = []

    def offered(*_: Any, seed: int, **__: Any) -> dict[str, Any]:
        seeds.append(seed)
        return reports[len(seeds) - 1]

    monkeypatch.setattr(online, "offer", offered)
    bench = online.Bench(TARGET, WORK, guidellm=Path("guidellm"), dollars_per_hour=None)
    assert bench.offer(rate=2.0) is reports[-1]
    assert len(set(seeds)) == loads
    reports[:] = [report(ttft_ms=[1.0], itl_ms=[1.0], late=30.0)] * 10
    with pytest.raises(LoadError, match="late 3 times"):
        bench.offer(rate=2.0)
    assert bench.offer(clients=3) is reports[0], "clients have no plan to be late for"
