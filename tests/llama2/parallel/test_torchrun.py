"""A command under torchrun ends with one line of rank 0, and takes the other ranks with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]

SCRIPT = """
import atexit, os, pathlib, signal, sys, time

from llama2.parallel.torchrun import exit_with

here = pathlib.Path(sys.argv[1])
if os.environ.get("RANK", "0") == "0":
    while not len(list(here.glob("*.pid"))) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        time.sleep(0.01)
    print("error: wrong", file=sys.stderr)
    exit_with(int(sys.argv[2]))


def show() -> None:
    (here / "rank.tmp").write_text(str(os.getpid()))
    (here / "rank.tmp").rename(here / "rank.pid")


if sys.argv[2] == "0":
    show()
    exit_with(0)
if sys.argv[3] == "leaves":  # Python is at its end when rank 0 ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    atexit.register(time.sleep, 60)
    atexit.register(show)
    exit_with(1)
show()
time.sleep(60)
"""


def run(folder: Path, status: int, other: str = "waits", *, torchrun: bool) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    command = [sys.executable, *launch, str(folder / "script.py"), str(folder), str(status), other]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_alone_it_is_the_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path, 2, torchrun=False)
    assert (done.returncode, done.stderr) == (2, "error: wrong\n")


@pytest.mark.integration
@pytest.mark.parametrize(
    ("status", "other", "code"), [(1, "waits", -signal.SIGUSR1), (1, "leaves", -signal.SIGUSR1), (0, "leaves", 0)]
)
def test_under_torchrun_there_is_one_line_and_no_rank_is_left(
    tmp_path: Path, status: int, other: str, code: int
) -> None:
    done = run(tmp_path, status, other, torchrun=True)
    assert (done.returncode, done.stderr) == (code, "error: wrong\n")
    rank = int((tmp_path / "rank.pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(rank).wait(10)
