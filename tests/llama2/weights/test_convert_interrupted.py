"""A conversion that ends midway leaves nothing half done, and the old checkpoint as it was."""

import errno
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch

from llama2.weights.convert import convert
from tests.support.conversion import ROOT, assert_holds, flags

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


@pytest.mark.parametrize("output", [[], ["--output_format", "fairscale", "--output_model_parallel_size", 2]])
def test_a_disk_that_fills_up_midway_leaves_the_old_checkpoint(source, tmp_path, command, monkeypatch, output):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert command(*flags(source, tmp_path / "out"))[0] == 0
    monkeypatch.setattr(os, "fsync", full)
    code, lines = command(*flags(source, tmp_path / "out"), "--overwrite", *output)
    assert code == 1
    assert "No space left on device" in lines[-1]
    monkeypatch.undo()
    assert_holds(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_disk_error_while_the_file_grows_is_not_lost(source, tmp_path, monkeypatch):
    """The kernel reports it once, to whoever flushes first."""
    save, flushed = torch.save, threading.Event()

    def slow_save(*args: Any) -> None:
        flushed.wait(10)
        save(*args)

    def refuse(descriptor: int) -> None:
        flushed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "save", slow_save)
    monkeypatch.setattr(os, "fdatasync", refuse)
    with pytest.raises(ValueError, match=r"Input/output error: .*__0_0.distcp"):
        convert(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.integration
def test_a_write_that_the_system_refuses_names_the_file(source, tmp_path):
    """torch.save replaces the system's error with its own."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        "import convert_checkpoints; convert_checkpoints.main()"
    )
    options = [str(flag) for flag in flags(source, tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", limited, *options], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: [Errno 27] File too large: '{tmp_path}/.out.partial/__0_0.distcp'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


INTERRUPTED = """
import os, signal, convert_checkpoints
from llama2.weights.readers.dcp import _SmallWrites
write, calls = _SmallWrites.write, []
def interrupt(*args):
    calls.append(args)
    if len(calls) == 5:
        os.kill(os.getpid(), signal.{signal})
    return write(*args)
_SmallWrites.write = interrupt
convert_checkpoints.main()
"""


@pytest.mark.integration
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_an_interrupted_run_leaves_the_old_checkpoint_and_the_next_run_works(source, tmp_path, command, name):
    options = flags(source, tmp_path / "out")
    assert command(*options)[0] == 0
    code = INTERRUPTED.format(signal=name)
    arguments = [sys.executable, "-c", code, *(str(flag) for flag in options), "--overwrite", "--dtype", "float16"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode in (128 + signal.Signals[name], -signal.Signals[name]), done.stderr
    assert "Traceback" not in done.stderr
    assert_holds(tmp_path / "out")
    left = {path.name for path in tmp_path.iterdir()} - {"out", "source"}
    assert left == ({".out.partial"} if name == "SIGKILL" else set())
    assert command(*options, "--overwrite")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
