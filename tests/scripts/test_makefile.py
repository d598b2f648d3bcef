"""What `make` does in a clone where nothing is set up yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.serve import ROOT


@pytest.mark.parametrize("target", ["stop", "clean"])
def test_what_removes_things_sets_nothing_up_first(target: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "build").mkdir()
    command = ["make", "--no-print-directory", "--file", str(ROOT / "Makefile"), target, "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "nothing to stop: nothing is set up yet")
    assert not (tmp_path / ".venv").exists()
    assert (tmp_path / "build").exists() == (target == "stop")
