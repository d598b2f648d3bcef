"""Which sums go past NCCL. That the kernel sums right is tests/llama2/test_gpu.py's, on two GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama2 import collectives
from llama2.collectives import ONE_SHOT_BYTES, ProcessGroupCollectives, SymmetricMemoryCollectives, connect


@pytest.mark.parametrize(
    ("x", "is_one_shot"),
    [
        (torch.ones(1, 4096, dtype=torch.bfloat16), True),
        (torch.ones(ONE_SHOT_BYTES // 4), True),
        (torch.ones(ONE_SHOT_BYTES // 4 + 4), False),
        (torch.ones(3, 3), False),
        (torch.ones(8, dtype=torch.float16), False),
    ],
    ids=["a decoded token", "the largest", "larger", "no multiple of 16 bytes", "fp16"],
)
def test_small_sums_take_one_shot(monkeypatch: pytest.MonkeyPatch, x: torch.Tensor, is_one_shot: bool) -> None:
    taken: list[str] = []

    def one_shot(shared: torch.Tensor, local: torch.Tensor, operation: str, group: str) -> torch.Tensor:
        assert (shared.shape, shared.dtype, shared.is_contiguous()) == (local.shape, local.dtype, True)
        assert (operation, group) == ("sum", "0")
        taken.append("one shot")
        return local

    def nccl(self: ProcessGroupCollectives, x: torch.Tensor) -> torch.Tensor:
        taken.append("NCCL")
        return x

    monkeypatch.setattr(torch.ops.symm_mem, "one_shot_all_reduce_copy", one_shot)
    monkeypatch.setattr(ProcessGroupCollectives, "all_reduce", nccl)
    group: Any = SymmetricMemoryCollectives.__new__(SymmetricMemoryCollectives)
    group._buffer, group._group_name = torch.empty(ONE_SHOT_BYTES, dtype=torch.uint8), "0"
    assert group.all_reduce(x) is x
    assert taken == ["one shot" if is_one_shot else "NCCL"]


def test_ranks_on_two_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_hosts(answers: list[object], mine: object) -> None:
        answers[:] = [("here", "x86_64"), ("there", "x86_64")]

    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_gather_object", two_hosts)
    with pytest.raises(ValueError, match="symm_mem_all_reduce needs all ranks on one host"):
        connect(torch.device("cuda"), symm_mem_all_reduce=True)
