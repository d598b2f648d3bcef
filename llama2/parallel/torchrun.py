"""Owns how a command ends that may run under torchrun: with one line of one rank, and without torchrun's report.

Knows no process group.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from typing import NoReturn

import psutil


def exit_with(status: int) -> NoReturn:
    """End this process with `status`, and torchrun with it where that is an error.

    All ranks call this, or rank 0 alone: it has reported the error, its status is the only one that counts, and it
    ends the ranks that wait for it.
    """
    first = os.environ.get("RANK", "0") == "0"
    if first and status:
        _end_torchrun()
    if not first:
        # Rank 0 may end this one now: a handler that raises would show its traceback at Python's end.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Any other code would make torchrun report this rank, and stop rank 0.
    sys.exit(status if first else 0)


def read_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """This process's command line; where it is wrong, or asks for help, rank 0 says so for all, and they end."""
    first = os.environ.get("RANK", "0") == "0"
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        try:
            return parser.parse_args()
        except SystemExit as usage:
            exit_with(usage.code if isinstance(usage.code, int) else 1)


def _end_torchrun() -> None:
    """End torchrun without the report of 40 lines and a traceback that it makes of every exit code but 0, and of the
    signals that it handles.

    SIGUSR1 is one that it does not handle: its exit code is 138, and a shell says "User defined signal 1". Shells keep
    silent about SIGINT and SIGPIPE alone, of which torchrun handles the one and Python ignores the other.
    """
    parent = psutil.Process(os.getppid())
    words = " ".join(parent.cmdline())
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and ("torchrun" in words or "torch.distributed.run" in words):
        others = [process for process in parent.children() if process.pid != os.getpid()]
        parent.send_signal(signal.SIGUSR1)
        for process in others:
            if process.is_running():
                process.terminate()
