"""Only the engine's thread divides its operators among the processors."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

from llama2.machine.threads import hand_over, undivided


def test_undivided_holds_here_and_in_threads_begun_here() -> None:
    before = torch.get_num_threads()
    seen = []
    with undivided() as threads:
        assert threads == before
        assert torch.get_num_threads() == 1
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [1]
    assert torch.get_num_threads() == before


HAND_OVER = """
import threading, torch
from llama2.machine.threads import hand_over
torch.set_num_threads(2)
take_over = hand_over()
def divide():
    take_over()
    torch.randn(1 << 20).exp_()
    print(torch.get_num_threads())
other = threading.Thread(target=divide)
other.start()
other.join()
torch.randn(1 << 20).exp_()
print(torch.get_num_threads())
"""


@pytest.mark.integration
def test_the_thread_that_takes_over_divides_and_the_other_does_not() -> None:
    done = subprocess.run([sys.executable, "-c", HAND_OVER], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "1"]


def test_handing_over_leaves_the_number_to_whoever_takes_over() -> None:
    before = torch.get_num_threads()
    take_over = hand_over()
    assert torch.get_num_threads() == 1
    take_over()
    assert torch.get_num_threads() == before
