"""Owns the machine's ceilings, measured now: memory bandwidth, and operations per second of a product.

Knows no model.
"""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.limits import Rates

# Far beyond any cache.
BUFFER_BYTES = 1 << 30
# The best size depends on caches; the best rate of these counts.
PRODUCT_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
# Other work on the machine can only lower a rate, so the best of several counts.
SECONDS = 1.0
# Passes over the buffer for a rate of the moment.
READS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates of all ranks together, measured at the same time.

    A copy counts the bytes it reads and writes. `read_bytes_per_second` is of a sum of the same bytes: decoding only
    reads, which some machines do faster.
    """

    copy_bytes_per_second: float
    read_bytes_per_second: float
    flops_per_second: float

    @property
    def rates(self) -> Rates:
        """The rates that limits are computed from: the better of copy and read, and the product."""
        return Rates(
            bytes_per_second=max(self.copy_bytes_per_second, self.read_bytes_per_second),
            flops_per_second=self.flops_per_second,
        )


@torch.inference_mode()
def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure on every rank of the process group at once; each gets the sum over the ranks."""
    mine = (*_memory_rates(device), _product_rate(device, dtype))
    ranks: list[tuple[float, float, float]] = [mine] * dist.get_world_size()
    if len(ranks) > 1:
        dist.all_gather_object(ranks, mine)
    copy, read, flops = (sum(rates) for rates in zip(*ranks, strict=True))
    return Ceilings(copy_bytes_per_second=copy, read_bytes_per_second=read, flops_per_second=flops)


class ReadRate:
    """Bytes per second at which this process reads a CPU's memory, at the moment of the call.

    Where the machine is shared, it changes within seconds, by half and more: what is held against it is measured in
    turns with it.
    """

    def __init__(self) -> None:
        self._source = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32)

    @torch.inference_mode()
    def __call__(self) -> float:
        return self._source.nbytes / statistics.median(timeit.repeat(self._source.sum, number=1, repeat=READS))


def _memory_rates(device: torch.device) -> tuple[float, float]:
    """Bytes per second of a copy and of a read."""
    source = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_seconds = _best_seconds(partial(target.copy_, source), device)
    return 2 * source.nbytes / copy_seconds, source.nbytes / _best_seconds(source.sum, device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square product."""
    rates = []
    for size in PRODUCT_SIZES[device.type]:
        x, weight = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / _best_seconds(partial(F.linear, x, weight), device))
    return max(rates)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest time of `work` in about `SECONDS` of tries, all ranks starting together."""
    work()
    _wait(device)
    if dist.get_world_size() > 1:
        dist.barrier()
    best, deadline = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
