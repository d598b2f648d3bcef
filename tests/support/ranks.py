"""Runs a function on several ranks of a gloo group, in processes that start in milliseconds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*args)` on every rank, as under torchrun (RANK, LOCAL_RANK, WORLD_SIZE are set, the process group
    is up) and return the picklable results in rank order.

    `function` must be importable (a module-level function). Children are forked from a server that imported torch
    once, so that a group starts fast and no thread of pytest's is forked. Results travel by plain pickle, since
    torch's own way for tensors needs the sender to live on.

    Raises:
        RuntimeError: some rank raised (its traceback is in the message) or did not end in `timeout` seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.tensor"])
    with TemporaryDirectory() as folder:
        receivers, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_main, args=(rank, world_size, folder, sender, function, args))
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        try:
            return _collect(receivers, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(receivers: list[connection.Connection], timeout: float) -> list[Any]:
    """Every rank's result. As under torchrun, the first rank that fails ends the wait for the others."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(receivers):
        pending = {receiver: rank for rank, receiver in enumerate(receivers) if rank not in results}
        ready = connection.wait(list(pending), max(0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"rank {', '.join(map(str, pending.values()))}: no answer in {timeout} s")
        for receiver in ready:
            assert isinstance(receiver, connection.Connection)
            rank = pending[receiver]
            try:
                ok, results[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                ok, results[rank] = False, "the process ended without an answer"
            if not ok:
                raise RuntimeError(f"rank {rank}: {results[rank]}")
    return [results[rank] for rank in range(len(receivers))]


def _main(
    rank: int, world_size: int, folder: str, sender: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=world_size)
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        sender.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
