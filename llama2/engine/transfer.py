"""Owns copies of small tensors to the device and back: the host waits only for what it reads.

Knows no model. On a CPU nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import Tensor


def upload(values: list[Any], beside: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
    """Numbers, or rows of them, on another tensor's device. Copies from unpinned memory would block."""
    device = beside.device
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def upload_rows(rows: Items[Tensor], beside: Tensor) -> Tensor:
    """Host tensors of one shape, as rows of one tensor on another's device: a single copy, as in `upload`."""
    pinned = beside.device.type == "cuda"
    stacked = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=pinned)
    return torch.stack(list(rows), out=stacked).to(beside.device, non_blocking=True)


def row_index(rows: list[int], values_RX: Tensor) -> Tensor | None:
    """What `select` takes for these rows, in this order: None for all of them, the usual case."""
    return None if rows == list(range(len(values_RX))) else upload(rows, values_RX)


def select(values_RX: Tensor, rows_N: Tensor | None) -> Tensor:
    """(N, X): those rows. Indexing with a list would make PyTorch copy it from pageable memory, and wait."""
    return values_RX if rows_N is None else values_RX.index_select(0, rows_N)


class Download:
    """Tensors on their way to the host; the device may still be computing them."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._arrived: torch.cuda.Event | None = None
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(
                torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
                for tensor in tensors
            )
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[list[Any]]:
        """The values of each, once they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.tolist() for tensor in self._tensors]
