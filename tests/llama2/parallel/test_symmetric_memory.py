"""Which sums bypass NCCL, and that all ranks go back to it together. test_gpu.py checks the kernels' sums.

Ranks are processes on the CPU, with gloo in place of torch's kernels.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama2.config import EngineConfig
from llama2.parallel import collectives, symmetric_memory
from llama2.parallel.collectives import ProcessGroupCollectives, connect
from llama2.parallel.symmetric_memory import BUFFER_BYTES, ONE_SHOT_BYTES, SymmetricMemory
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")
KERNELS = {"one shot": "one_shot_all_reduce", "multicast": "multimem_all_reduce_", "two shots": "two_shot_all_reduce_"}


@pytest.mark.parametrize(
    ("x", "path"),
    [
        (torch.ones(1, 4096, dtype=torch.bfloat16), "one shot"),
        (torch.ones(ONE_SHOT_BYTES // 4), "one shot"),
        (torch.ones(4096, 4).t(), "one shot"),
        (torch.ones(ONE_SHOT_BYTES // 4 + 4), "large"),
        (torch.ones(512, 8192, dtype=torch.bfloat16), "large"),
        (torch.ones(BUFFER_BYTES // 4 + 4), "NCCL"),
        (torch.ones(3, 3), "NCCL"),
        (torch.ones(8, dtype=torch.float16), "NCCL"),
        (torch.ones(8, dtype=torch.int64), "NCCL"),
        (torch.ones(0, 8), "NCCL"),
    ],
    ids=[
        *("a decoded token", "the largest in one shot", "not contiguous", "larger", "512 tokens of 70B"),
        *("larger than the buffer", "no multiple of 16 bytes", "fp16", "ids", "empty"),
    ],
)
@pytest.mark.parametrize("has_multicast", [True, False])
def test_a_sums_size_and_type_decide_its_path(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, path: str, has_multicast: bool
) -> None:
    taken: list[str] = []
    buffer = torch.zeros(BUFFER_BYTES, dtype=torch.uint8)

    def sum_in_memory(name: str) -> Any:
        def kernel(shared: torch.Tensor, operation: str, group: str) -> torch.Tensor:
            assert (shared.shape, shared.dtype, shared.is_contiguous()) == (x.shape, x.dtype, True)
            assert (shared.data_ptr(), operation, group) == (buffer.data_ptr(), "sum", "0")
            taken.append(name)
            return shared.mul_(2) if name.endswith("_") else shared * 2

        return kernel

    def nccl(x: torch.Tensor) -> None:
        taken.append("NCCL")
        x.mul_(2)

    for name in KERNELS.values():
        monkeypatch.setattr(torch.ops.symm_mem, name, sum_in_memory(name))
    monkeypatch.setattr(dist, "all_reduce", nccl)
    group: Any = ProcessGroupCollectives.__new__(ProcessGroupCollectives)
    group._symmetric = SymmetricMemory(buffer, "0", has_multicast=has_multicast)
    expected = x * 2
    total = group.all_reduce(x.clone(memory_format=torch.preserve_format))
    assert torch.equal(total, expected)
    assert total.data_ptr() != buffer.data_ptr()  # where the next sum would overwrite it
    large = "multicast" if has_multicast else "two shots"
    assert taken == [KERNELS.get(large if path == "large" else path, "NCCL")]


def sum_over_gloo(shared: torch.Tensor, operation: str, group: str) -> torch.Tensor:
    total = shared.float()
    dist.all_reduce(total)
    return shared.copy_(total)


def pretend(step: str | None, rank: int) -> None:
    """Replace all that asks for a GPU; `step` fails on that rank alone, and those that meet wait for it."""
    is_broken = dist.get_rank() == rank

    def fail_at(here: str) -> None:
        if step == here and is_broken:
            raise RuntimeError(f"no {here}\nC++ frames")

    def allocate(device: torch.device) -> torch.Tensor:
        fail_at("memory")
        return torch.zeros(BUFFER_BYTES, dtype=torch.uint8)

    def meet(buffer: torch.Tensor, group: dist.ProcessGroup) -> bool:
        fail_at("meeting")
        if step == "meeting":
            group.get_group_store().wait(["the one that failed"])
        return dist.get_rank() == 0  # multicast is useless on one GPU

    def sum_wrong(shared: torch.Tensor, operation: str, group: str) -> torch.Tensor:
        return sum_over_gloo(shared, operation, group) + (step == "sum" and is_broken)

    def no_multicast(shared: torch.Tensor, operation: str, group: str) -> torch.Tensor:
        raise AssertionError("not all GPUs have it")

    module: Any = symmetric_memory
    module.PATIENCE_SECONDS = 1.0
    module.check = lambda device, num_hosts: fail_at("check")
    module._allocate, module._meet, module._wait = allocate, meet, lambda device: None
    operators: Any = torch.ops.symm_mem
    operators.one_shot_all_reduce = sum_wrong
    operators.two_shot_all_reduce_ = sum_over_gloo
    operators.multimem_all_reduce_ = no_multicast


def sums_of_all_sizes() -> list[bool]:
    pretend(None, rank=0)
    memory = SymmetricMemory.connect(CPU, num_hosts=1)
    assert memory is not None
    same = []
    for count in (4, 4096, ONE_SHOT_BYTES // 4, ONE_SHOT_BYTES, BUFFER_BYTES // 4, 8):
        x = torch.randn(count, generator=torch.Generator().manual_seed(count + dist.get_rank()))
        expected = x.clone()
        dist.all_reduce(expected)
        same.append(torch.equal(memory.all_reduce(x), expected))
    return same


@pytest.mark.integration
def test_one_buffer_serves_sums_of_all_sizes_one_after_the_other() -> None:
    for same in run_ranks(2, sums_of_all_sizes):
        assert all(same)


def attempt(step: str, rank: int) -> tuple[bool, list[str], float, bool]:
    """Did this rank get symmetric memory; what it logged; seconds it took; is the group's patience as before?"""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("llama2").addHandler(handler)
    logging.getLogger("llama2").setLevel(logging.INFO)
    pretend(step, rank)
    assert dist.group.WORLD is not None
    store: Any = dist.group.WORLD.get_group_store()
    before, begin = store.timeout, time.monotonic()
    memory = SymmetricMemory.connect(CPU, num_hosts=1)
    dist.barrier()  # the group can go on
    return memory is not None, messages, time.monotonic() - begin, store.timeout == before


@pytest.mark.integration
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("check", "rank {rank}: no check"),
        ("memory", "rank {rank}: no memory"),
        ("meeting", "rank .: .*"),  # or that rank 0 waited for it
        ("sum", r"rank {rank}: a sum of 16 bytes of torch\.float32 came out wrong"),
    ],
)
def test_a_rank_that_fails_alone_takes_all_back_to_nccl(step: str, reason: str, rank: int) -> None:
    first, *others = run_ranks(3, attempt, step, rank)
    for is_connected, _, seconds, has_patience_back in (first, *others):
        assert not is_connected
        assert seconds < 20
        assert has_patience_back
    (message,) = first[1]
    prefix = "NCCL makes all sums between the GPUs: symmetric memory cannot be used: "
    assert message.startswith(prefix)
    assert re.fullmatch(reason.format(rank=rank), message.removeprefix(prefix))
    assert "\n" not in message
    assert not any(messages for _, messages, _, _ in others)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"num_hosts": 2}, "the ranks are on 2 hosts"),
        ({"capability": (7, 5)}, r"compute capability 8\.0, and the GPU has 7\.5"),
        ({"reaches": False}, "GPU 1 does not reach the memory of GPU 0"),
        ({"folder": "/tmp/" + "x" * 90}, "folder for temporary files is too long: /tmp/x"),
    ],
    ids=str,
)
def test_what_is_known_to_fail_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str | None
) -> None:
    case: dict[str, Any] = {"num_hosts": 1, "capability": (9, 0), "reaches": True, "folder": "/tmp"} | changes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: case["reaches"])
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("TMPDIR", case["folder"])
    with pytest.raises(RuntimeError, match=reason) if reason else contextlib.nullcontext():
        symmetric_memory.check(torch.device("cuda", 1), case["num_hosts"])


@pytest.mark.parametrize(("device", "is_asked"), [("cuda", True), ("cpu", False)])
def test_it_is_tried_unless_it_is_switched_off(monkeypatch: pytest.MonkeyPatch, device: str, is_asked: bool) -> None:
    def two_hosts(answers: list[object], mine: object) -> None:
        answers[:] = [("here", "x86_64"), ("there", "x86_64")]

    asked: list[int] = []
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.dist, "new_group", lambda **kwargs: None)
    monkeypatch.setattr(collectives.dist, "all_gather_object", two_hosts)
    monkeypatch.setattr(SymmetricMemory, "connect", lambda device, num_hosts: asked.append(num_hosts))
    for wanted in (EngineConfig().symm_mem_all_reduce, False):
        assert isinstance(connect(torch.device(device), symm_mem_all_reduce=wanted), ProcessGroupCollectives)
    assert asked == [2] * is_asked
