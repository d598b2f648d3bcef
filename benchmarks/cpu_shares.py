"""Owns where processor time goes while a server is under load: its engine, its handler, its Java, or the load.

Knows neither the load's figures nor what they measure.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

import numpy as np
import psutil

RANK = "llama2.engine.rank"  # in a rank's arguments
PARTS = ("engine", "handler", "java", "load", "others")
INTERVAL = 0.5  # s


class CpuWatch:
    """Reads the processor time of a server's processes, and of this process's children, during its `with` block.

    `java` is TorchServe's front end, its worker the `handler`, and the ranks are the `engine`. `load` are this
    process's descendants, and `others` the rest of the machine: if that is much, something disturbed the measurement.
    """

    def __init__(self, server: Iterable[psutil.Process]) -> None:
        self._server = tuple(server)
        self._used: dict[tuple[str, psutil.Process], float] = {}  # s; for a process that has ended, the last value seen
        self._samples: list[tuple[float, ...]] = []  # time, then of each part
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
                times = process.cpu_times()  # including threads that have ended
                self._used[self._part(process), process] = times.user + times.system
        sums = dict.fromkeys(PARTS, 0.0)
        for (part, _), seconds in self._used.items():
            sums[part] += seconds
        machine = psutil.cpu_times()
        busy = machine.user + machine.nice + machine.system + machine.irq + machine.softirq
        sums["others"] = busy - sum(sums.values())
        self._samples.append((time.time(), *sums.values()))

    def _part(self, process: psutil.Process) -> str:
        if process not in self._server:
            return "load"
        if process.name() == "java":
            return "java"
        return "engine" if RANK in process.cmdline() else "handler"
