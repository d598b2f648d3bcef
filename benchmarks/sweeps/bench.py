"""Owns the time of one call on a device, and its row of results.

On a GPU many calls are recorded as one CUDA graph and replayed: launches cost nothing, as in the engine. Each uses
other buffers than the one before, as layers do, so that none finds its inputs in the cache. Knows no kernel.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import torch

from benchmarks.limits import Rates

Calls = Sequence[Callable[[], object]]

# Total size of the buffers that take turns: several times the cache of any GPU.
SPREAD_BYTES = 256 << 20
# Calls of one recording, and its replays, of which the median counts.
CALLS, REPLAYS = 24, 7


class Bench:
    """Times calls and hands rows to `keep` as they come."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        rates: Rates,
        *,
        deadline: float,
        keep: Callable[[dict[str, Any]], None],
        compiles: tuple[int, int] | None = None,
    ) -> None:
        """After `deadline`, in time.monotonic's seconds, calls are skipped.

        `compiles`, share i of n, times nothing: it calls every n-th kernel once, which leaves it in Triton's cache.
        """
        self.device = device
        self.dtype = dtype
        self._rates = rates
        self._deadline = deadline
        self._keep = keep
        self._compiles = compiles
        self._index = 0

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def copies(self, nbytes: int) -> int:
        """How many buffers of `nbytes` take turns."""
        if self.device.type != "cuda" or self._compiles:
            return 1
        return max(1, -(-SPREAD_BYTES // nbytes))

    def row(
        self,
        kernel: str,
        prepare: Callable[[], Calls],
        *,
        nbytes: int = 0,
        flop: int = 0,
        recorded: bool = True,
        **settings: Any,
    ) -> None:
        """Time what `prepare` returns: the same work, `nbytes` moved or `flop` done, on one set of buffers each.

        Calls that wait for their result are not `recorded`; their time is the host's. A kernel that cannot run here
        with these `settings` gives a row that says why.
        """
        self._index += 1
        if self._compiles:
            share, shares = self._compiles
            if self._index % shares == share:
                with contextlib.suppress(Exception):  # the caller says why
                    prepare()[0]()
            return
        row: dict[str, Any] = {"kernel": _named(kernel, settings)}
        if time.monotonic() > self._deadline:
            self._keep({**row, "left_out": "no time left"})
            return
        try:
            seconds = self._seconds(prepare(), recorded=recorded)
        except Exception as error:  # Triton and CUDA raise classes of their own
            reason = str(error).strip().splitlines() or [""]
            self._keep({**row, "left_out": f"{type(error).__name__}: {reason[0][:200]}"})
            return
        rate, ceiling = nbytes / seconds, self._rates.bytes_per_second
        unit, scale = "GB/s", 1e9
        if flop:
            rate, ceiling = flop / seconds, self._rates.flops_per_second
            unit, scale = "TFLOP/s", 1e12
        self._keep(
            {
                **row,
                "microseconds": 1e6 * seconds,
                "rate": rate / scale,
                "unit": unit,
                "percent_of_ceiling": 100 * rate / ceiling,
                "settings": settings,
            }
        )

    def _seconds(self, calls: Calls, *, recorded: bool) -> float:
        if self.device.type != "cuda" or not recorded:
            return _on_the_host(calls)
        for call in calls:
            call()  # compiles it and sets up libraries, which cannot be recorded
        torch.cuda.synchronize(self.device)
        count = max(CALLS, len(calls))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in islice(cycle(calls), count):
                call()
        graph.replay()
        times: list[float] = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3 / count)
        return statistics.median(times)


def _on_the_host(calls: Calls) -> float:
    calls[0]()
    times = []
    for call in islice(cycle(calls), REPLAYS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _named(kernel: str, settings: Mapping[str, Any]) -> str:
    return " ".join((kernel, *(f"{name}={value}" for name, value in settings.items())))
