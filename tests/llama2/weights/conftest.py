"""Meta's folder, and the converter's command in this process, as it is and as one that must fail."""

from __future__ import annotations

import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
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


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Path], str]:
    """Convert what is at a path, which must fail, quickly and in one line: that line."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def run(path: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        flags = ["--original_ckpt_dir", str(path), "--save_checkpoint_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["convert_checkpoints.py", *flags])
        capsys.readouterr()
        memory, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        with pytest.raises(SystemExit) as exit:
            convert_checkpoints.main()
        assert time.process_time() - seconds < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100 << 10  # KiB
        assert exit.value.code == 1
        assert sorted(tmp_path.rglob("*")) == before
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        (line,) = (line for line in lines if line and "B/s]" not in line)
        assert line.startswith("error: ")
        return line

    return run
