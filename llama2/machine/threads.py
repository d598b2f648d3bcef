"""Owns which thread may divide its work by OpenMP, as PyTorch's operators on a CPU do: the engine's, and no other.

OpenMP keeps a team of threads for every thread that once divided something. When the teams together outnumber the
processors, GNU's puts their threads to sleep between operators instead of letting them spin for a while: waking them
cost 40 µs an operator on 2 cores, more than most operators. PyTorch's number is each thread's own, and a new thread
begins with what was set last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undivided() -> Iterator[int]:
    """Within, no operator is divided, in this thread and those begun here; yields by how many it else would be.

    For what comes before the engine's loop, which may run in another thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def hand_over() -> Callable[[], None]:
    """From now on this thread divides nothing. The other thread that calls what is returned divides in its place."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(threads)
