"""Owns sums between the GPUs of one host in memory that all of them reach: PyTorch's symmetric memory, not NCCL.

Knows no model, and no other transport: where it cannot be used, `connect` returns None on every rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from llama2.parallel.process_group import gather_objects

logger = logging.getLogger(__name__)

BUFFER_BYTES = 8 << 20
# In one shot every rank reads every other's whole message; beyond this size each byte is summed by one rank alone.
ONE_SHOT_BYTES = 256 << 10
# How long the ranks wait for the slowest one at the rendezvous, and for the first sums.
PATIENCE_SECONDS = 60.0
# The longest socket name (sun_path of unix(7)), including its terminating zero.
_SOCKET_NAME_BYTES = 108


class SymmetricMemory:
    """One buffer on each GPU for all sums, which run one after the other on one stream, also in recorded CUDA graphs.

    A sum is: copy into this rank's buffer; a kernel that begins and ends with a barrier of all ranks; copy out. Between
    its barriers a kernel reads the others' buffers, and for large sums writes them. No rank can still do so when this
    one fills its buffer for the next sum: its own kernel has ended, so all ranks have reached the last barrier. And
    none can begin the next sum while this rank still copies out: the first barrier waits for its next kernel.

    In one shot, and without multicast, ranks are added in order; with multicast the switch adds every element
    once and sends it to all. So all ranks have the same bits.

    The copy into the buffer is a separate step. `one_shot_all_reduce_copy` would save it, but the threads that signal
    the other ranks do not wait until the rest of their block has copied (torch's CUDASymmetricMemoryOps.cu).
    """

    def __init__(self, buffer: torch.Tensor, group_name: str, *, has_multicast: bool) -> None:
        """`buffer`: BUFFER_BYTES of symmetric memory, after the rendezvous of all ranks."""
        self._buffer = buffer
        self._group_name = group_name
        self._has_multicast = has_multicast

    @classmethod
    def connect(cls, device: torch.device, num_hosts: int) -> SymmetricMemory | None:
        """Called on every rank of the default process group; None on all of them if it cannot be used on one.

        Then rank 0 logs the reason. After each step that can fail on one rank alone, all ranks exchange their results,
        so that none goes on alone.

        Raises:
            TimeoutError: the GPUs wait for each other forever, and nothing else can run on them.
        """
        group = dist.group.WORLD
        assert group is not None
        with _Attempt() as attempt:
            check(device, num_hosts)
            buffer = _allocate(device)
        if attempt.succeeded:
            with _Attempt() as attempt, _short_waits(group):
                has_multicast = _meet(buffer, group)
        if attempt.succeeded:
            # If one GPU had no multicast, the others would wait for it.
            memory = cls(buffer, group.group_name, has_multicast=all(gather_objects(has_multicast)))
            with _Attempt() as attempt:
                memory._try_out(device)
        if attempt.succeeded:
            return memory
        if dist.get_rank() == 0:
            logger.info("NCCL makes all sums between the GPUs: symmetric memory cannot be used: %s", attempt.reason)
        return None

    def takes(self, x: torch.Tensor) -> bool:
        """Can `all_reduce` sum `x`? Its kernels move 16 bytes at a time, and support these two dtypes."""
        return 0 < x.nbytes <= BUFFER_BYTES and x.nbytes % 16 == 0 and x.dtype in (torch.bfloat16, torch.float32)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's `x`. May overwrite `x`. Does not block the host."""
        shared = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        shared.copy_(x)
        if x.nbytes <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce(shared, "sum", self._group_name)
        if self._has_multicast:
            torch.ops.symm_mem.multimem_all_reduce_(shared, "sum", self._group_name)
        else:
            torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group_name)
        return x.copy_(shared)

    def _try_out(self, device: torch.device) -> None:
        """Compare sums of every kind with the expected ones, so that a hardware fault shows here, with a clear message.

        Raises:
            RuntimeError: a sum is wrong.
        """
        rank, ranks = dist.get_rank(), range(dist.get_world_size())
        wrong: list[str] = []
        for dtype in (torch.float32, torch.bfloat16):
            for nbytes in (16, ONE_SHOT_BYTES, BUFFER_BYTES):
                place = torch.arange(nbytes // dtype.itemsize, dtype=torch.int32, device=device)
                # Small whole numbers are exact in any order.
                total = self.all_reduce(((place + rank) % 4).to(dtype))
                expected = sum(((place + other) % 4 for other in ranks), torch.zeros_like(place))
                _wait(device)
                if not torch.equal(total, expected.to(dtype)):
                    wrong.append(f"a sum of {nbytes} bytes of {dtype} came out wrong")
        # Only now: the other ranks take part in every sum.
        if wrong:
            raise RuntimeError(wrong[0])


def check(device: torch.device, num_hosts: int) -> None:
    """What can be checked before anything is tried.

    Raises:
        RuntimeError: this GPU cannot take part.
    """
    if num_hosts > 1:
        raise RuntimeError(f"the ranks are on {num_hosts} hosts")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"its kernels need compute capability 8.0, and the GPU has {major}.{minor}")
    # With one visible GPU per rank the others cannot be checked here; the rendezvous will fail instead.
    for other in range(min(torch.cuda.device_count(), dist.get_world_size())):
        if other != device.index and not torch.cuda.can_device_access_peer(device.index, other):
            raise RuntimeError(f"GPU {device.index} does not reach the memory of GPU {other}")
    # torch copies the name of a socket in this folder into a field of fixed length, without checking it.
    folder = next((os.environ[name] for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ), "/tmp")
    if len(os.fsencode(f"{folder}/symm_mem-{os.getpid()}")) >= _SOCKET_NAME_BYTES:
        raise RuntimeError(f"the path of the folder for temporary files is too long: {folder}")


class _Attempt:
    """A step that may fail on any rank; afterwards all ranks know that it `succeeded` on all, or the first `reason`."""

    reason: str | None = None

    @property
    def succeeded(self) -> bool:
        return self.reason is None

    def __enter__(self) -> _Attempt:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, TimeoutError) or not isinstance(error, (Exception, type(None))):
            return False
        # The other ranks must know of any failure.
        answers = gather_objects(None if error is None else (str(error) or type(error).__name__).splitlines()[0])
        self.reason = next(
            (f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer is not None), None
        )
        return True


def _allocate(device: torch.device) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    return symmetric_memory.empty(BUFFER_BYTES, dtype=torch.uint8, device=device)


def _meet(buffer: torch.Tensor, group: dist.ProcessGroup) -> bool:
    """The rendezvous of the ranks' buffers; returns whether the switch adds and multicasts (NVLink SHARP)."""
    import torch.distributed._symmetric_memory as symmetric_memory

    return bool(symmetric_memory.rendezvous(buffer, group).multicast_ptr)


@contextlib.contextmanager
def _short_waits(group: dist.ProcessGroup) -> Iterator[None]:
    """The rendezvous uses the group's store, where a rank would wait half an hour for another that has failed."""
    store: Any = group.get_group_store()
    before = store.timeout
    store.set_timeout(timedelta(seconds=PATIENCE_SECONDS))
    try:
        yield
    finally:
        store.set_timeout(before)


def _wait(device: torch.device) -> None:
    """Wait until the GPU has done all its work.

    Raises:
        TimeoutError: it does not finish.
    """
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done.query():
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"the GPUs did not make a sum in their shared memory in {PATIENCE_SECONDS:.0f} s: "
                "set symm_mem_all_reduce to false"
            )
        time.sleep(0.001)
