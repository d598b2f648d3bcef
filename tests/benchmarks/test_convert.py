"""The converter's benchmark: both ways take turns, the fastest counts, and all rounds are written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import convert


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in place of the converter, and an interpreter that imports nothing."""
    monkeypatch.setattr(convert, "_command", lambda source, result, processes: ["cp", "-r", source, result])
    monkeypatch.setattr(convert, "IDLE", "import time; print(flush=True); time.sleep(60)")


@pytest.mark.integration
@pytest.mark.usefixtures("quick")
def test_the_fastest_of_the_rounds_counts_and_all_of_them_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results" / "convert.json"
    convert.benchmark(gigabytes=0.08, rounds=2, folder=str(tmp_path), out=str(out))
    content = json.loads(out.read_text())
    assert content["settings"] == {"gigabytes": 0.08, "processes": 1, "rounds": 2}
    figures = content["figures"]
    assert figures["bytes"] == pytest.approx(0.08e9, rel=0.2)
    assert [len(figures[f"{what}_seconds"]) for what in ("convert", "start", "cp")] == [2, 2, 2]
    for what in ("convert", "cp"):
        fastest = min(figures[f"{what}_seconds"])
        assert figures[f"{what}_gb_per_s"] == pytest.approx(figures["bytes"] / 1e9 / fastest)
    assert figures["ratio"] == pytest.approx(min(figures["cp_seconds"]) / min(figures["convert_seconds"]))
    header, row, written = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["GB", "convert", "GB/s"]
    assert row.split()[0] == f"{figures['bytes'] / 1e9:.2f}"
    assert written == f"wrote {out}"
    assert not list(tmp_path.glob("benchmark-convert-*"))


@pytest.mark.integration
def test_a_converter_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no room')"]
    monkeypatch.setattr(convert, "_command", lambda source, result, processes: command)
    with pytest.raises(SystemExit, match="no room"):
        convert.benchmark(gigabytes=0.001, rounds=1, folder=str(tmp_path), out=str(tmp_path / "convert.json"))
    assert [*tmp_path.iterdir()] == []
