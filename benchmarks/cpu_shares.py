"""Owns where the processors' time goes while a server is loaded: to its engine, its handler, its Java, or to the load.

Knows neither the load's figures nor what is measured by them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator

import numpy as np
import psutil

PARTS = ("engine", "handler", "java", "load", "others")
INTERVAL = 0.5  # s


class CpuWatch:
    """Reads the processor time of a server's processes, and of all that this process starts, during its `with` block.

    `java` is TorchServe's front end. Of its workers, the main threads are the `handler`, which answers polls, and all
    others the `engine`: its own thread, and those that compute with it. `load` are this process's descendants, and
    `others` the rest of the machine: if it is much, something disturbed the measurement.
    """

    def __init__(self, server: Iterable[psutil.Process]) -> None:
        self._server = tuple(server)
        self._used: dict[tuple[str, psutil.Process], float] = {}  # s; of a process that has ended, what was seen last
        self._samples: list[tuple[float, ...]] = []  # when, then of each part
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CpuWatch:
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def cores(self, start: float, end: float) -> dict[str, float]:
        """How many processors each part kept busy between two times within the block, in seconds since the epoch."""
        times, *parts = zip(*self._samples, strict=True)
        return {
            part: float(np.diff(np.interp((start, end), times, seconds))[0]) / (end - start)
            for part, seconds in zip(PARTS, parts, strict=True)
        }

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._sample()

    def _sample(self) -> None:
        for process in (*self._server, *psutil.Process().children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                for part, seconds in self._read(process):
                    self._used[part, process] = seconds
        sums = dict.fromkeys(PARTS, 0.0)
        for (part, _), seconds in self._used.items():
            sums[part] += seconds
        machine = psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        sums["others"] = busy - sum(sums.values())
        self._samples.append((time.time(), *sums.values()))

    def _read(self, process: psutil.Process) -> Iterator[tuple[str, float]]:
        threads = {thread.id: thread.user_time + thread.system_time for thread in process.threads()}
        times = process.cpu_times()  # of threads that have ended, too
        total = times.user + times.system
        if process not in self._server:
            yield "load", total
        elif process.name() == "java":
            yield "java", total
        else:
            yield "handler", threads[process.pid]
            yield "engine", total - threads[process.pid]
