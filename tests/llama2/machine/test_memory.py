"""What is free is what the system says is available, shared among the ranks of a host."""

from __future__ import annotations

import psutil
import pytest
import torch

from llama2.machine.memory import free_memory


def test_free_memory_is_shared_among_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    # Other processes take and give back while this runs.
    assert free_memory(cpu) == pytest.approx(psutil.virtual_memory().available, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 4 * free_memory(cpu) == pytest.approx(psutil.virtual_memory().available, rel=0.01)
