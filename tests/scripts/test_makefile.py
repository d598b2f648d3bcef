"""What `make` does in a clone where nothing is set up yet."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.serve import ROOT


@pytest.mark.parametrize("target", ["stop", "clean"])
def test_what_removes_things_sets_nothing_up_first(target: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    for name in ("server", "finetune", "evaluation"):
        (tmp_path / "build" / name).mkdir(parents=True)
    command = ["make", "--no-print-directory", "--file", str(ROOT / "Makefile"), target, "PYTHON=false"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "nothing to stop: nothing is set up yet")
    assert not (tmp_path / ".venv").exists()
    assert (tmp_path / "build" / "server").exists() == (target == "stop")
    # What took a user's time to make stays.
    assert (tmp_path / "build" / "finetune").exists()
    assert (tmp_path / "build" / "evaluation").exists()


def test_chat_says_that_it_installs_and_does_so_once(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for program in ("pip", "python"):
        (tmp_path / ".venv" / "bin" / program).symlink_to("/bin/true")
    (tmp_path / ".venv" / ".ready").touch()
    command = ["make", "--no-print-directory", "--file", str(ROOT / "Makefile"), "chat"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert (first.stdout, second.stdout) == ("== install what the chat page needs (gradio), this once\n", "")
