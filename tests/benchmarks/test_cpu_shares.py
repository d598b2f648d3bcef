"""Processor time counts for the process that used it, and for nobody twice."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from benchmarks import cpu_shares
from benchmarks.cpu_shares import CpuWatch

# Uses so many processor seconds in its main thread and in another one, then says so and sleeps.
BUSY = """
import ctypes, sys, threading, time
name, here, beside = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end: pass
thread = threading.Thread(target=work, args=(beside,))
thread.start(), work(here), thread.join()
print(flush=True)
time.sleep(60)
"""
# Lets another one work for it, and ends it.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {BUSY!r}, *sys.argv[1:]], stdout=subprocess.PIPE)
child.stdout.readline()
time.sleep(0.2)
child.kill(), child.wait()
print(flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def started(program: str, name: str, here: float, beside: float, *marks: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-S", "-c", program, name, str(here), str(beside), *marks]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.integration
def test_each_process_counts_for_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the server's processes are our descendants, as the load's are. What ends before the block does counts."""
    monkeypatch.setattr(cpu_shares, "INTERVAL", 0.05)
    with (
        started(BUSY, "python", 0.2, 0.0) as worker,
        started(BUSY, "python", 0.2, 0.4, cpu_shares.RANK) as rank,
        started(BUSY, "java", 0.3, 0.1) as java,
        CpuWatch([psutil.Process(process.pid) for process in (worker, rank, java)]) as watch,
    ):
        begin = time.time()
        with started(PARENT, "python", 0.4, 0.4) as load:
            for process in (worker, rank, java, load):
                assert process.stdout is not None
                process.stdout.readline()
        end = time.time()
    used = {part: cores * (end - begin) for part, cores in watch.cores(begin, end).items()}
    # An interpreter also starts in each of them.
    assert 0.5 <= used["engine"] <= 0.9
    assert 0.1 <= used["handler"] <= 0.5
    assert 0.3 <= used["java"] <= 0.7
    assert 0.75 <= used["load"] <= 1.3
    assert used["others"] > -0.1, "nothing counts twice"
    assert sum(used.values()) <= (end - begin) * (os.cpu_count() or 1) * 1.05, "no more than the machine has"


def test_the_ranks_are_known_by_the_module_that_they_run() -> None:
    assert importlib.util.find_spec(cpu_shares.RANK) is not None


def test_only_what_lies_between_the_two_times_counts() -> None:
    """Half way between two readings, half of their difference."""
    watch = CpuWatch([])
    watch._samples = [
        (100.0, 5.0, 1.0, 0.0, 0.0, 7.0),
        (101.0, 6.0, 1.0, 0.5, 0.0, 7.0),
        (103.0, 9.0, 1.0, 0.5, 4.0, 8.0),
    ]
    assert watch.cores(100.5, 102.0) == pytest.approx(
        {"engine": (0.5 + 1.5) / 1.5, "handler": 0, "java": 0.25 / 1.5, "load": 2 / 1.5, "others": 0.5 / 1.5}
    )
