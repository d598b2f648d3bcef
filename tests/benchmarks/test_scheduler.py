"""The scheduler's benchmark measures what it says: decoding steps of all that run, while others wait."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.scheduler import benchmark, measure


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (5, 30)])
def test_every_part_of_a_step_is_timed(running: int, waiting: int) -> None:
    """`measure` itself asserts that each step decodes every sequence."""
    times = measure(running=running, waiting=waiting, context=40, steps=5)
    assert (times.running, times.waiting) == (running, waiting)
    assert min(times.schedule, times.update, times.pickle, times.unpickle, times.add, times.abort) > 0
    assert times.step >= max(times.schedule, times.update)
    assert times.step_per_running == pytest.approx(times.step / running, abs=0.01)
    assert times.plan_bytes > running * 4 * (40 // 16), "block tables are in it"


def test_one_of_several_ranks_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, lines in (("1", 0), ("0", 4)):
        monkeypatch.setenv("RANK", rank)
        benchmark(running=1, waiting=0, context=20, steps=2, out=str(tmp_path / f"{rank}.json"))
        assert len(capsys.readouterr().out.splitlines()) == lines
    assert [path.name for path in tmp_path.iterdir()] == ["0.json"]


def test_a_row_for_each_pair_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(running=(1, 2), waiting=(0, 3), context=20, steps=2, out=str(tmp_path / "scheduler.json"))
    rows = json.loads((tmp_path / "scheduler.json").read_text())["figures"]
    assert [(row["running"], row["waiting"]) for row in rows] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:5]] == [
        ["running", "waiting"],
        *(["1", "0"], ["1", "3"], ["2", "0"], ["2", "3"]),
    ]
