"""Owns what the ranks of one tensor-parallel group move between them, sums, gathers and rank 0's messages, and by which
transport.

Knows no model and no engine. All ranks must make the same calls in the same order; a rank that does not is reported by
`LockstepError` with its number and the place, where the transport can tell.
"""

from __future__ import annotations

import mmap
import platform
import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from llama2.parallel.process_group import gather_objects
from llama2.parallel.shared_memory import Shared, SharedMemory
from llama2.parallel.symmetric_memory import SymmetricMemory

# How long a rank with a GPU looks for rank 0's next message without a pause.
SPIN_SECONDS = 1.0


class Collectives(Protocol):
    """What the model and the engine need of a group of ranks."""

    rank: int
    world_size: int

    @property
    def shared(self) -> Shared | None:
        """None if the sums of this group are made by `all_reduce` alone."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`, the same bits on every rank. May overwrite `x`."""

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        """On rank 0 the ranks' `x` side by side in the last dimension (rank r's has `sizes[r]`), in fp32; else None."""

    def broadcast_object(self, message: Any = None) -> Any:
        """Rank 0's `message` on every rank. A rank other than 0 waits for it, for hours if need be."""


class SingleRank:
    """The group of one: nothing moves."""

    rank = 0
    world_size = 1
    shared: Shared | None = (None, 0, 1, 0, 0.0)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        return x.float()

    def broadcast_object(self, message: Any = None) -> Any:
        return message


class ProcessGroupCollectives:
    """NCCL on GPUs, gloo between hosts' CPUs.

    Control messages take `control` where the group shares a host, and sums `symmetric` where it can make them.
    """

    shared: Shared | None = None

    def __init__(self, control: SharedMemory | None, symmetric: SymmetricMemory | None = None) -> None:
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = control
        self._symmetric = symmetric
        # A server may be idle for days between two messages, and idleness is no fault.
        self._control_group = None if control else dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        if self._symmetric is not None and self._symmetric.takes(x):
            return self._symmetric.all_reduce(x)
        dist.all_reduce(x)
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        # The transport wants equal shapes: pad to the widest, cut again on arrival.
        padded = x.new_zeros(*x.shape[:-1], max(sizes))
        padded[..., : x.shape[-1]] = x
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, parts)
        if parts is None:
            return None
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1).float()

    def broadcast_object(self, message: Any = None) -> Any:
        if self._control is not None:
            return self._control.broadcast_object(message)
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self._control_group)
        return box[0]


def connect(device: torch.device, *, symm_mem_all_reduce: bool = False, memory: mmap.mmap | None = None) -> Collectives:
    """The fastest transport that the default process group allows for tensors on `device`. Called on every rank.

    `memory` is what the ranks of this host share already, of `shared_layout.mapping_bytes`, else one of them makes it.
    `symm_mem_all_reduce` asks for symmetric memory between the GPUs of one host; where there is none, NCCL does it all.
    """
    if dist.get_world_size() == 1:
        return SingleRank()
    hosts = gather_objects((socket.gethostname(), platform.machine()))
    one_host = len(set(hosts)) == 1 and platform.machine() in ("x86_64", "AMD64")
    shared = None
    if one_host:
        # A pause between two looks is as long as a step of 7B on 8 GPUs. On CPUs a look takes time from computing.
        shared = SharedMemory.connect(memory, spin_seconds=0.0 if device.type == "cpu" else SPIN_SECONDS)
    if shared is not None and device.type == "cpu":
        return shared
    symmetric = None
    if symm_mem_all_reduce and device.type == "cuda":
        symmetric = SymmetricMemory.connect(device, num_hosts=len({host for host, _ in hosts}))
    return ProcessGroupCollectives(shared, symmetric)
