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
import os, pathlib, sys, time

from llama2.parallel.torchrun import exit_with

here = pathlib.Path(sys.argv[1])
if os.environ.get("RANK", "0") == "0":
    while not len(list(here.glob("*.pid"))) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        time.sleep(0.01)
    print("error: wrong", file=sys.stderr)
    exit_with(int(sys.argv[2]))
(here / "rank.tmp").write_text(str(os.getpid()))
(here / "rank.tmp").rename(here / "rank.pid")
if sys.argv[2] == "0":
    exit_with(0)
time.sleep(60)
"""


def run(folder: Path, status: int, *, torchrun: bool) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else []
    command = [sys.executable, *launch, str(folder / "script.py"), str(folder), str(status)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def test_alone_it_is_the_exit_code(tmp_path: Path) -> None:
    done = run(tmp_path, 2, torchrun=False)
    assert (done.returncode, done.stderr) == (2, "error: wrong\n")


@pytest.mark.integration
@pytest.mark.parametrize(("status", "code"), [(1, -signal.SIGUSR1), (0, 0)])
def test_under_torchrun_there_is_one_line_and_no_rank_is_left(tmp_path: Path, status: int, code: int) -> None:
    done = run(tmp_path, status, torchrun=True)
    assert (done.returncode, done.stderr) == (code, "error: wrong\n")
    other = int((tmp_path / "rank.pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(other).wait(10)
