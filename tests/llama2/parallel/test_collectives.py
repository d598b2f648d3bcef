"""How a rank waits for rank 0's next message. What moves between ranks is tests/distributed's."""

from __future__ import annotations

import mmap
import os
from types import SimpleNamespace

import pytest
import torch

from llama2.parallel import collectives, shared_memory
from llama2.parallel.collectives import SPIN_SECONDS, connect
from llama2.parallel.shared_layout import mapping_bytes
from llama2.parallel.shared_memory import SharedMemory


@pytest.mark.parametrize("spin_seconds", [0.0, 1.0])
def test_a_waiting_rank_spins_as_long_as_told_and_then_sleeps(
    monkeypatch: pytest.MonkeyPatch, spin_seconds: float
) -> None:
    looks, now, pauses = 0, 0.0, 0

    def look() -> None:
        nonlocal looks, now
        looks += 1
        now += 1e-5

    def sleep(seconds: float) -> None:
        nonlocal pauses
        pauses += 1
        if pauses == 5:
            group._header[0] = 1  # rank 0's message

    mapping = mmap.mmap(-1, mapping_bytes(2))
    group = SharedMemory(mapping, 1, 2, spin_seconds=spin_seconds)
    monkeypatch.setattr(shared_memory, "time", SimpleNamespace(monotonic=lambda: 100 + now, sleep=sleep))
    monkeypatch.setattr(os, "sched_yield", look)
    group._await(0, 1, idle=True)
    assert pauses == 5
    assert spin_seconds <= now <= spin_seconds + 0.05
    assert looks > 2000


@pytest.mark.parametrize(("device", "spin_seconds"), [("cpu", 0.0), ("cuda", SPIN_SECONDS)])
def test_ranks_spin_for_longer_where_gpus_do_the_work(
    monkeypatch: pytest.MonkeyPatch, device: str, spin_seconds: float
) -> None:
    def gather(answers: list[object], mine: object) -> None:
        answers[:] = [("here", "x86_64")] * 2

    def share(_: object, *, spin_seconds: float) -> SimpleNamespace:
        asked.append(spin_seconds)
        return SimpleNamespace()

    asked: list[float] = []
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(collectives.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(collectives.dist, "all_gather_object", gather)
    monkeypatch.setattr(collectives.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(SharedMemory, "connect", share)
    connect(torch.device(device))
    assert asked == [spin_seconds]
