"""Owns how a benchmark runs another program, which may start more: none of them outlives the benchmark.

Knows no program.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil


def complete(
    command: Sequence[str | Path], *, cwd: Path | str, environ: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, and return what it printed. Any interruption, including SIGTERM's SystemExit, kills it
    and all that it has started: `subprocess.run` would kill torchrun, and leave its ranks behind.
    """
    with subprocess.Popen(
        command, cwd=cwd, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            for one in (*psutil.Process(process.pid).children(recursive=True), process):
                one.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, errors)
