"""Shared memory moves what gloo would move, and notices a rank out of step."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from llama2.parallel.shared_memory import SLOT_BYTES, SharedMemory
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.integration


def sums() -> list[bool]:
    """All-reduces of many sizes, around the slot's own, against gloo's in fp64."""
    group = SharedMemory.connect()
    same = []
    slot = SLOT_BYTES // 4
    for count in (1, 7, 576, slot - 1, slot, slot + 1, 2 * slot + 5):
        x = torch.randn(count, generator=torch.Generator().manual_seed(count + 1000 * group.rank))
        expected = x.double()
        dist.all_reduce(expected)
        ours = group.all_reduce(x.clone())
        everyone = [torch.empty_like(ours) for _ in range(group.world_size)]
        dist.all_gather(everyone, ours)
        same.append(
            torch.allclose(ours.double(), expected, atol=1e-5) and all(torch.equal(ours, one) for one in everyone)
        )
    return same


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_equals_gloo_and_gives_every_rank_the_same_bits(world_size: int) -> None:
    for same in run_ranks(world_size, sums):
        assert all(same)


def many_in_a_row() -> float:
    group = SharedMemory.connect()
    total = 0.0
    for step in range(2000):
        total += group.all_reduce(torch.full((3,), float(step * (group.rank + 1))))[0].item()
    return total


def test_a_fast_rank_never_overwrites_what_a_slow_one_still_reads() -> None:
    expected = sum(step * 6.0 for step in range(2000))
    assert run_ranks(3, many_in_a_row) == [expected] * 3


def gathers() -> list[bool]:
    group = SharedMemory.connect()
    sizes = (3, 4, 1)
    same = []
    for rows, dtype in ((1, torch.float32), (5, torch.bfloat16), (SLOT_BYTES // 8, torch.float32)):
        whole = torch.randn(rows, sum(sizes), generator=torch.Generator().manual_seed(rows)).to(dtype)
        start = sum(sizes[: group.rank])
        gathered = group.gather(whole[:, start : start + sizes[group.rank]], sizes)
        same.append(gathered is None if group.rank else gathered is not None and torch.equal(gathered, whole.float()))
    return same


def test_gather_puts_uneven_parts_side_by_side_in_fp32_on_rank_0_only() -> None:
    for same in run_ranks(3, gathers):
        assert all(same)


def messages() -> list[object]:
    group = SharedMemory.connect()
    sent = [{"step": 1}, b"x" * (3 * SLOT_BYTES), None, list(range(1000))]
    return [group.broadcast_object(message if group.rank == 0 else None) for message in sent]


def test_messages_of_any_length_arrive_in_order() -> None:
    sender, *receivers = run_ranks(3, messages)
    assert all(received == sender for received in receivers)


def bring_different_sizes() -> None:
    group = SharedMemory.connect()
    group.all_reduce(torch.zeros(4 + group.rank))


def test_a_rank_that_makes_another_call_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"LockstepError: rank \d brought \d+ bytes to operation 1"):
        run_ranks(2, bring_different_sizes)


def stay_away() -> None:
    group = SharedMemory.connect()
    group._stall_seconds = 0.5
    if group.rank == 0:
        group.all_reduce(torch.zeros(4))
    dist.barrier()


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RuntimeError, match="rank 1 stands at operation 0 and did not reach operation 1, where rank 0"):
        run_ranks(2, stay_away)


def sums_both_ways() -> list[bool]:
    """The C++ operator and the Python that stands in for it, on the same mapping in turns."""
    group = SharedMemory.connect()
    assert group._has_operators
    same = []
    for dtype in (torch.float32, torch.bfloat16):
        for count in (1, 100, SLOT_BYTES):
            x = torch.randn(count, generator=torch.Generator().manual_seed(group.rank)).to(dtype)
            group._has_operators = True
            fast = group.all_reduce(x.clone())
            group._has_operators = False
            same.append(torch.equal(fast, group.all_reduce(x.clone())))
    return same


def test_without_a_compiler_the_ranks_get_the_same_bits() -> None:
    for same in run_ranks(2, sums_both_ways):
        assert all(same)
