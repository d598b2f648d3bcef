"""Meta's folder, and the converter's command in this process."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest

import convert_checkpoints
from tests.support.conversion import ARGS, WEIGHTS
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    folder = meta_folder(tmp_path_factory.mktemp("pristine"), ARGS, WEIGHTS, num_shards=4)
    tiny_sentencepiece(folder, vocab_size=480)
    return folder


@pytest.fixture
def source(pristine, tmp_path) -> Path:
    """A copy of Meta's folder that a test may spoil."""
    return shutil.copytree(pristine, tmp_path / "source")


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: (exit code, lines on stderr that are no progress bar)."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*flags: object) -> tuple[object, list[str]]:
        monkeypatch.setattr(sys, "argv", ["convert_checkpoints.py", *(str(flag) for flag in flags)])
        with pytest.raises(SystemExit) as exit:
            convert_checkpoints.main()
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        return exit.value.code, [line for line in lines if line and "B/s]" not in line]

    return run
