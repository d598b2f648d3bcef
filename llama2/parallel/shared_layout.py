"""Owns the layout of the memory that the ranks of one host share, for those who write it and those who look on.

Per rank a cache line of int64 (its flag, and the bytes in its slot of either buffer), then two buffers of one slot per
rank. The flag is the number of operations that a rank has contributed to. Knows no torch.
"""

from __future__ import annotations

import mmap

SLOT_BYTES = 1 << 20
LINE_BYTES = 64
LINE = LINE_BYTES // 8


def mapping_bytes(world_size: int) -> int:
    return world_size * (LINE_BYTES + 2 * SLOT_BYTES)


def header(mapping: mmap.mmap, world_size: int) -> memoryview:
    """The cache lines of all ranks, as int64."""
    return memoryview(mapping)[: world_size * LINE_BYTES].cast("q")
