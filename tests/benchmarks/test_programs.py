"""A program that a benchmark runs: what it printed, and that none of it stays."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.programs import complete

# Starts another one, then interrupts its own parent.
PARENT = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path("started").write_text(f"{os.getpid()} {child.pid}")
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(60)
"""


def test_what_it_printed_and_how_it_ended_come_back(tmp_path: Path) -> None:
    script = "import os, sys; print(os.getcwd(), os.environ['WORD']); sys.exit('no')"
    done = complete([sys.executable, "-c", script], cwd=tmp_path, environ={"WORD": "yes"})
    assert (done.returncode, done.stdout, done.stderr) == (1, f"{tmp_path} yes\n", "no\n")


def test_interrupting_it_leaves_nothing_behind(tmp_path: Path) -> None:
    """As with torchrun, whose ranks would compute on and slow the next measurement."""
    former = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(143))
    try:
        with pytest.raises(SystemExit):
            complete([sys.executable, "-c", PARENT], cwd=tmp_path, environ=os.environ)
    finally:
        signal.signal(signal.SIGUSR1, former)
    family = [int(pid) for pid in (tmp_path / "started").read_text().split()]
    assert len(family) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, family)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
