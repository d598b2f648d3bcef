"""Owns the processes of one host's ranks: starts them with what they need to find each other, tells which of them has
ended, and ends them.

Nothing of it can be reached from another host: the ranks meet at a store and over sockets of the loopback interface,
and talk to whoever started them through pipes that only the two have. Knows no model and no torch: what a rank runs is
a module, and `llama2/parallel/process_group.py` is its side of all this.
"""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from llama2.parallel import shared_layout

_ROOT = Path(__file__).resolve().parents[2]
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Running ranks, in order. `connections` are the ends of their pipes, and `memory` is what they share."""

    processes: Sequence[subprocess.Popen[bytes]]
    connections: Sequence[Connection]
    memory: mmap.mmap

    @classmethod
    def start(cls, module: str, degree: int, *, threads: int) -> Ranks:
        """Run `python -m module` once for each of `degree` ranks, with so many OpenMP `threads`.

        Each finds itself as under torchrun (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE), and the rest in its
        arguments: the descriptors of its pipe, of the shared memory and of the store's socket, and the store's port.

        Raises:
            OSError: there is no memory to share, or no process can be started.
        """
        size = shared_layout.mapping_bytes(degree)
        descriptor = os.memfd_create("llama2-ranks")
        processes, connections = [], []
        with socket.socket() as listener:
            listener.bind((_LOOPBACK, 0))
            listener.listen()
            os.posix_fallocate(descriptor, 0, size)
            for rank in range(degree):
                ours, theirs = Pipe()
                passed = [theirs.fileno(), descriptor, listener.fileno()]
                command = [sys.executable, "-m", module, *map(str, passed), str(listener.getsockname()[1])]
                environ = _environ(rank, degree, threads)
                processes.append(subprocess.Popen(command, env=environ, pass_fds=passed, stdin=subprocess.DEVNULL))
                connections.append(ours)
                theirs.close()
        memory = mmap.mmap(descriptor, size)
        os.close(descriptor)
        return cls(processes=processes, connections=connections, memory=memory)

    def operations(self) -> list[int]:
        """How many operations each rank has contributed to; zeros where they do not use the shared memory."""
        lines = shared_layout.header(self.memory, len(self.processes))
        return [lines[rank * shared_layout.LINE] for rank in range(len(self.processes))]

    def describe(self, rank: int) -> str:
        """A rank's process and what it does, for a message."""
        process = self.processes[rank]
        try:
            state = psutil.Process(process.pid).status()
        except psutil.NoSuchProcess:
            state = "ended"
        return f"process {process.pid}, {state}"

    def ending(self, rank: int) -> str:
        """How a rank has ended, for a message."""
        try:
            code = self.processes[rank].wait(5)
        except subprocess.TimeoutExpired:
            return "has closed its pipe"
        if code >= 0:
            return f"has ended with exit code {code}"
        what = signal.Signals(-code).name
        return f"was killed by {what}" + (" (out of memory?)" if what == "SIGKILL" else "")

    def cpu_seconds(self, rank: int) -> float:
        """Processor time that a rank has used so far; 0 if it has ended."""
        try:
            times = psutil.Process(self.processes[rank].pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def wait(self, timeout: float) -> None:
        """Wait for the end of all, and then end those that are left."""
        psutil.wait_procs([psutil.Process(one.pid) for one in self.processes if one.poll() is None], timeout=timeout)
        self.kill()

    def kill(self) -> None:
        """End all, also those that hang or are stopped."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def _environ(rank: int, degree: int, threads: int) -> dict[str, str]:
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(degree) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
    }
