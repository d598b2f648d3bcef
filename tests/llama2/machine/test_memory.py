"""What is free is what the system, or a container's limit, leaves, shared among the ranks of a host."""

from __future__ import annotations

import psutil
import pytest
import torch

from llama2.machine import memory
from llama2.machine.memory import free_memory

CPU = torch.device("cpu")


def test_free_memory_is_shared_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "allowed_memory", list)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    # Other processes take and give back while this runs.
    assert free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 4 * free_memory(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.01)


def test_a_containers_limit_counts_where_it_leaves_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(memory, "allowed_memory", lambda: [10**15, 6000])
    assert free_memory(CPU) == 3000
