"""Owns how large memory is allocated, on Linux CPUs in huge pages; and how much is free.

The weights stream through a CPU at every step. Pages of 2 MB instead of 4 KB cause fewer TLB misses, and fewer page
faults when memory is first touched.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import torch

from llama2.machine.cgroup import allowed_memory


def empty(count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`count` uninitialized values; freed with the last tensor that views them."""
    if device.type != "cpu" or not sys.platform.startswith("linux") or count == 0:
        return torch.empty(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def zeros(count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `empty`, of zeros. On Linux CPUs a page takes memory when it is first written to, and is zero until then."""
    values = empty(count, dtype=dtype, device=device)
    return values if device.type == "cpu" and sys.platform.startswith("linux") else values.zero_()


def free_memory(device: torch.device) -> int:
    """Bytes that this rank may still take of `device`: the ranks on the CPUs of one host share its memory evenly."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def free_host_memory() -> int:
    """Bytes available without swapping, page cache included: the machine's, or fewer where a container has a limit."""
    if sys.platform.startswith("linux"):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min([int(line.split()[1]) * 1024, *allowed_memory()])
    import psutil  # portable; on Linux it reads the same line

    return int(psutil.virtual_memory().available)
