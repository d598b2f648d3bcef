"""Owns how bytes move between the ranks of one tensor-parallel group: sums, gathers, and rank 0's control messages.

Knows no model and no engine. All ranks must make the same calls in the same order; a rank that does not is reported by
`LockstepError` with its number and the place, where the transport can tell.
"""

from __future__ import annotations

import mmap
import os
import pickle
import platform
import socket
import tempfile
import time
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from llama2.kernels.cpu.library import load_library
from llama2.parallel.symmetric_memory import SymmetricMemory

SLOT_BYTES = 1 << 20
LINE_BYTES = 64
LINE = LINE_BYTES // 8
STALL_SECONDS = 300.0
# How long a rank with a GPU looks for rank 0's next message without a pause.
SPIN_SECONDS = 1.0


class LockstepError(RuntimeError):
    """A rank is not where the others are: it made another call, or none."""


# For an operator that sums over the ranks by itself: their shared memory, this rank, how many there are, the bytes of a
# slot, and the seconds to wait for another. A group of one has no memory to share.
Shared = tuple[torch.Tensor | None, int, int, int, float]


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

    def __init__(self, control: SharedMemoryCollectives | None, symmetric: SymmetricMemory | None = None) -> None:
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


class SharedMemoryCollectives:
    """The ranks of one host through one shared mapping: each copies into its slot, flags it, and waits for the others.

    Layout: per rank a cache line of int64 (its flag, and the bytes in its slot of either buffer), then two buffers of
    one slot per rank. The flag is the number of operations that a rank has contributed to. Operation n uses buffer
    n % 2, so a rank may fill its slot for n as soon as every flag is at least n - 1: whoever contributed to n - 1 has
    finished reading n - 2. Flags are published by plain stores, which x86 keeps in order; other processors take the
    process group instead.
    """

    def __init__(
        self,
        mapping: mmap.mmap,
        rank: int,
        world_size: int,
        *,
        stall_seconds: float = STALL_SECONDS,
        spin_seconds: float = 0.0,
    ) -> None:
        """`spin_seconds`: so long after a message a rank looks for the next one without a pause, then a thousand times
        a second, so that an idle server costs next to nothing."""
        self.rank = rank
        self.world_size = world_size
        self._stall_seconds = stall_seconds
        self._spin_seconds = spin_seconds
        header_bytes = world_size * LINE_BYTES
        self._header = memoryview(mapping)[:header_bytes].cast("q")
        self._mapping = torch.frombuffer(mapping, dtype=torch.uint8)
        self._slots = self._mapping[header_bytes:].view(2, world_size, SLOT_BYTES)

    @cached_property
    def _has_operators(self) -> bool:
        """They count in the same place. GPUs that only hear rank 0 here need not wait until they are compiled."""
        return load_library()

    @property
    def _operation(self) -> int:
        return self._header[self.rank * LINE]

    @property
    def shared(self) -> Shared | None:
        if not self._has_operators:
            return None
        return self._mapping, self.rank, self.world_size, SLOT_BYTES, self._stall_seconds

    @staticmethod
    def mapping_bytes(world_size: int) -> int:
        return world_size * (LINE_BYTES + 2 * SLOT_BYTES)

    @classmethod
    def connect(cls, *, spin_seconds: float = 0.0) -> SharedMemoryCollectives:
        """Map one file on every rank of the default process group; the file has no name by the time this returns.

        Raises:
            OSError: /dev/shm has no room for `mapping_bytes`.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        size = cls.mapping_bytes(world_size)
        path: list[Any] = [None]
        if rank == 0:
            shm = Path("/dev/shm")
            descriptor, path[0] = tempfile.mkstemp(prefix="llama2-", dir=shm if shm.is_dir() else None)
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                path[0] = OSError(error.errno, f"no room for {size >> 20} MiB of shared memory: {error.strerror}")
        dist.broadcast_object_list(path, src=0)
        if isinstance(path[0], OSError):
            raise path[0]
        if rank != 0:
            descriptor = os.open(path[0], os.O_RDWR)
        mapping = mmap.mmap(descriptor, size)
        os.close(descriptor)
        dist.barrier()
        if rank == 0:
            os.unlink(path[0])
        return cls(mapping, rank, world_size, spin_seconds=spin_seconds)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.view(-1)
        if self.shared is not None and x.dtype in (torch.float32, torch.bfloat16):
            try:
                torch.ops.llama2_cpu.all_reduce(flat, *self.shared)
            except RuntimeError as error:
                raise LockstepError(str(error).splitlines()[0]) from None
            return x
        step = SLOT_BYTES // flat.element_size()
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            buffer = self._contribute(part)
            self._await_all(buffer, part.nbytes)
            # One sum over the rank axis: in rank order and, for bf16, in fp32 within, so every rank gets the same bits.
            torch.sum(self._slots[buffer].view(x.dtype)[:, : part.numel()], dim=0, out=part)
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        step = max(1, SLOT_BYTES // (max(sizes) * x.element_size()))
        if max(sizes) * x.element_size() > SLOT_BYTES:
            raise ValueError(f"a row of {max(sizes)} {x.dtype} does not fit into a slot of {SLOT_BYTES} bytes")
        if self.rank != 0:
            for part in rows.split(step):
                self._contribute(part.contiguous().view(-1))
            return None
        whole = rows.new_empty(rows.shape[0], sum(sizes), dtype=torch.float32)
        mine, *others = whole.split(sizes, dim=-1)
        mine.copy_(rows)
        for start in range(0, rows.shape[0], step):
            buffer = self._contribute(None)
            self._await_all(buffer, None)
            for other, columns in enumerate(others, start=1):
                target = columns[start : start + step]
                target.copy_(self._slots[buffer, other].view(x.dtype)[: target.numel()].view(target.shape))
        return whole.view(*x.shape[:-1], sum(sizes))

    def broadcast_object(self, message: Any = None) -> Any:
        if self.rank == 0:
            payload = pickle.dumps(message)
            framed = len(payload).to_bytes(8, "little") + payload
            for start in range(0, len(framed), SLOT_BYTES):
                self._contribute(torch.frombuffer(bytearray(framed[start : start + SLOT_BYTES]), dtype=torch.uint8))
            return message
        received = bytearray()
        while len(received) < 8 or len(received) < 8 + int.from_bytes(received[:8], "little"):
            buffer = self._contribute(None)
            self._await(0, self._operation, idle=True)
            size = self._header[1 + buffer]
            received += self._slots[buffer, 0, :size].numpy().tobytes()
        return pickle.loads(memoryview(received)[8:])

    def _contribute(self, part: torch.Tensor | None) -> int:
        """Put `part` into this rank's slot of the next operation; returns the buffer that the operation uses."""
        for other in range(self.world_size):
            self._await(other, self._operation, idle=False)
        operation = self._operation + 1
        buffer = operation % 2
        if part is not None:
            self._slots[buffer, self.rank].view(part.dtype)[: part.numel()].copy_(part)
        self._header[self.rank * LINE + 1 + buffer] = 0 if part is None else part.nbytes
        self._header[self.rank * LINE] = operation
        return buffer

    def _await_all(self, buffer: int, nbytes: int | None) -> None:
        """Wait for every rank's contribution; with `nbytes`, each must have brought as many."""
        for other in range(self.world_size):
            self._await(other, self._operation, idle=False)
            size = self._header[other * LINE + 1 + buffer]
            if nbytes is not None and size != nbytes:
                raise self._out_of_step(other, self._operation)

    def _await(self, other: int, operation: int, *, idle: bool) -> None:
        """Spin until rank `other` has contributed to `operation`; an idle wait sleeps in the end, and has no end."""
        flag = other * LINE
        spins, begin = 0, 0.0
        while self._header[flag] < operation:
            # Other threads of this process run meanwhile: the call lets go of the interpreter.
            os.sched_yield()
            spins += 1
            if idle and spins > 2000:
                begin = begin or time.monotonic()
                if time.monotonic() - begin >= self._spin_seconds:
                    time.sleep(0.001)
            elif not idle and spins % 10000 == 0:
                begin = begin or time.monotonic()
                if time.monotonic() - begin > self._stall_seconds:
                    raise self._stalled(other, operation)

    def _stalled(self, other: int, operation: int) -> LockstepError:
        return LockstepError(
            f"rank {other} stands at operation {self._header[other * LINE]} and did not reach operation "
            f"{operation}, where rank {self.rank} waits, in {self._stall_seconds:.0f} s"
        )

    def _out_of_step(self, other: int, operation: int) -> LockstepError:
        theirs, mine = (self._header[rank * LINE + 1 + operation % 2] for rank in (other, self.rank))
        return LockstepError(
            f"rank {other} brought {theirs} bytes to operation {operation}, "
            f"where rank {self.rank} brought {mine}: it is out of step"
        )


def connect(device: torch.device, *, symm_mem_all_reduce: bool = False) -> Collectives:
    """The fastest transport that the default process group allows for tensors on `device`. Called on every rank.

    `symm_mem_all_reduce` asks for symmetric memory between the GPUs of one host; where there is none, NCCL does it all.
    """
    if dist.get_world_size() == 1:
        return SingleRank()
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, (socket.gethostname(), platform.machine()))
    one_host = len(set(hosts)) == 1 and platform.machine() in ("x86_64", "AMD64")
    shared = None
    if one_host:
        # A pause between two looks is as long as a step of 7B on 8 GPUs. On CPUs a look takes time from computing.
        shared = SharedMemoryCollectives.connect(spin_seconds=0.0 if device.type == "cpu" else SPIN_SECONDS)
    if shared is not None and device.type == "cpu":
        return shared
    symmetric = None
    if symm_mem_all_reduce and device.type == "cuda":
        symmetric = SymmetricMemory.connect(device, num_hosts=len({host for host, _ in hosts}))
    return ProcessGroupCollectives(shared, symmetric)
