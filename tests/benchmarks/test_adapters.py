"""The benchmark of adapters measures every cell, and prints the targets beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.adapters import ACTIVE, CELLS, WANTED_OF_REGISTERED, benchmark


@pytest.mark.integration
def test_each_cell_has_the_ratio_of_every_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(shape="tiny", rank=2, max_rank=4, rounds=2, out=str(tmp_path / "adapters.json"))
    *figures, loads = json.loads((tmp_path / "adapters.json").read_text())["figures"]
    assert [len(cell["ratios"]) for cell in figures] == [*(2 if cell.length == 1 else 1 for cell in CELLS), 1]
    assert all(cell["median"] > 0 for cell in figures)
    assert [len(seconds) for seconds in loads["seconds"].values()] == [ACTIVE] * 3
    lines = capsys.readouterr().out.splitlines()
    wanted = [cell.wanted for cell in CELLS if cell.wanted is not None]
    assert sum(line.endswith(("0.8", "0.85", "0.9", "0.95")) for line in lines) == len([*wanted, WANTED_OF_REGISTERED])
