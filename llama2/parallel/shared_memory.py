"""Owns sums, gathers and messages between the ranks of one host, through one mapping that all of them share.

Knows no other transport. `all_reduce.cpp` in llama2/kernels/cpu keeps the same protocol, for sums within an operator.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama2.kernels.cpu.library import load_library
from llama2.parallel.process_group import LockstepError
from llama2.parallel.shared_layout import LINE, SLOT_BYTES, header, mapping_bytes

STALL_SECONDS = 300.0

# What an operator needs to sum over the ranks by itself: the mapping, this rank, how many there are, the bytes of a
# slot, and the seconds to wait for another rank. A group of one has no mapping.
Shared = tuple[torch.Tensor | None, int, int, int, float]


class SharedMemory:
    """`Collectives` of the ranks of one host: each copies into its slot, flags it, and waits for the others.

    The layout is that of `shared_layout`. Operation n uses buffer n % 2, so a rank may fill its slot for n as soon as
    every flag is at least n - 1: whoever contributed to n - 1 has finished reading n - 2. Flags are published by
    plain stores, which x86 keeps in order; other processors take the process group instead.
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
        self._header = header(mapping, world_size)
        self._mapping = torch.frombuffer(mapping, dtype=torch.uint8)
        self._slots = self._mapping[self._header.nbytes :].view(2, world_size, SLOT_BYTES)

    @cached_property
    def _has_operators(self) -> bool:
        """They count in the same place. GPUs that only hear rank 0 here need not wait until they are compiled."""
        return load_library()

    @property
    def shared(self) -> Shared | None:
        if not self._has_operators:
            return None
        return self._mapping, self.rank, self.world_size, SLOT_BYTES, self._stall_seconds

    @classmethod
    def connect(cls, memory: mmap.mmap | None = None, *, spin_seconds: float = 0.0) -> SharedMemory:
        """Share `memory`, or map one file on every rank of the default process group; the file has no name by the time
        this returns.

        Raises:
            OSError: /dev/shm has no room for `mapping_bytes`.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if memory is not None:
            return cls(memory, rank, world_size, spin_seconds=spin_seconds)
        size = mapping_bytes(world_size)
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
        for part in flat.split(SLOT_BYTES // flat.element_size()):
            slots = self._exchange(part)
            # One sum over the rank axis: in rank order and, for bf16, in fp32 within, so every rank gets the same bits.
            torch.sum(slots.view(x.dtype)[:, : part.numel()], dim=0, out=part)
        return x

    def gather(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor | None:
        rows = x.reshape(-1, x.shape[-1])
        step = SLOT_BYTES // (max(sizes) * x.element_size())
        if step == 0:
            raise ValueError(f"a row of {max(sizes)} {x.dtype} does not fit into a slot of {SLOT_BYTES} bytes")
        if self.rank != 0:
            for part in rows.split(step):
                self._contribute(part.contiguous().view(-1))
            return None
        whole = rows.new_empty(rows.shape[0], sum(sizes), dtype=torch.float32)
        whole[:, : sizes[0]] = rows
        for some in whole.split(step):
            slots = self._exchange(None).view(x.dtype)
            for columns, slot in zip(some.split(sizes, dim=-1)[1:], slots[1:], strict=True):
                columns.copy_(slot[: columns.numel()].view(columns.shape))
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
            operation = self._contribute(None)
            self._await(0, operation, idle=True)
            received += self._slots[operation % 2, 0, : self._size(0, operation)].numpy().tobytes()
        return pickle.loads(memoryview(received)[8:])

    def _exchange(self, part: torch.Tensor | None) -> torch.Tensor:
        """Contribute `part`, and wait for all; returns every rank's slot, (ranks, SLOT_BYTES).

        With a `part` every rank must bring as many bytes.
        """
        operation = self._contribute(part)
        for other in range(self.world_size):
            self._await(other, operation)
            theirs, mine = self._size(other, operation), self._size(self.rank, operation)
            if part is not None and theirs != mine:
                raise LockstepError(
                    f"rank {other} brought {theirs} bytes to operation {operation}, "
                    f"where rank {self.rank} brought {mine}: it is out of step"
                )
        return self._slots[operation % 2]

    def _contribute(self, part: torch.Tensor | None) -> int:
        """Put `part` into this rank's slot of the next operation; returns the operation's number."""
        operation = self._header[self.rank * LINE] + 1
        for other in range(self.world_size):
            self._await(other, operation - 1)
        if part is not None:
            self._slots[operation % 2, self.rank].view(part.dtype)[: part.numel()].copy_(part)
        self._header[self.rank * LINE + 1 + operation % 2] = 0 if part is None else part.nbytes
        self._header[self.rank * LINE] = operation
        return operation

    def _size(self, rank: int, operation: int) -> int:
        """The bytes that a rank brought to one of the latest two operations."""
        return self._header[rank * LINE + 1 + operation % 2]

    def _await(self, other: int, operation: int, *, idle: bool = False) -> None:
        """Spin until rank `other` has contributed to `operation`; an idle wait sleeps in the end, and has no end.

        Raises:
            LockstepError: it did not in time.
        """
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
                    raise LockstepError(
                        f"rank {other} stands at operation {self._header[flag]} and did not reach operation "
                        f"{operation}, where rank {self.rank} waits, in {self._stall_seconds:.0f} s"
                    )
