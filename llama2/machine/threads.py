"""Owns which thread may use OpenMP, as PyTorch's CPU operators do: only the engine's.

OpenMP keeps a team of threads for every thread that once ran a parallel region. When the teams together outnumber the
processors, GNU's puts their threads to sleep between operators instead of letting them spin for a while: waking them
cost 40 µs per operator on 2 cores, more than most operators take. PyTorch's number of threads is set per thread, and a
new thread starts with the value set last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undivided() -> Iterator[int]:
    """Run operators on one thread, in this thread and those started here; yields the usual number of threads.

    For what runs before the engine's loop, which may be in another thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def hand_over() -> Callable[[], None]:
    """Stop using OpenMP in this thread; the thread that calls the returned function uses it instead."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    return lambda: torch.set_num_threads(threads)
