"""Owns how a large piece of memory is got from the system: on Linux CPUs in large pages.

The weights stream through a CPU at every step. In pages of 2 MB instead of 4 KB the processor looks up fewer addresses,
and memory that is touched for the first time costs fewer interruptions.
"""

from __future__ import annotations

import mmap
import sys

import torch


def empty(count: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`count` values that nobody has set; freed with the last tensor that views them."""
    if device.type != "cpu" or not sys.platform.startswith("linux") or count == 0:
        return torch.empty(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
