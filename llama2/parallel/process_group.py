"""Owns which device each rank computes on, and the process group over them. Knows no model."""

from __future__ import annotations

import logging
import mmap
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class LockstepError(RuntimeError):
    """A rank is not where the others are: it made another call, or none."""


def gather_objects(mine: Any) -> list[Any]:
    """What every rank of the default group passes here, in rank order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this rank: as asked, else its own GPU where every rank of the host has one, else the CPU.

    Rank i of a host has GPU i. Where CUDA_VISIBLE_DEVICES leaves one GPU, as SLURM does with another one for each rank,
    it is that.

    Raises:
        ValueError: a GPU is asked for, and this rank has none.
    """
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    count = torch.cuda.device_count()
    has_mask_of_one = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if device is None:
        device = "cuda" if count >= local_world_size or has_mask_of_one else "cpu"
        # A build without CUDA was installed for the CPU.
        if device == "cpu" and local_rank == 0 and (count or torch.backends.cuda.is_built()):
            logger.warning(
                "the CPU is used: %d GPUs are visible to the %d ranks of this host, and each rank needs one of its own",
                count, local_world_size,
            )  # fmt: skip
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        index = 0 if has_mask_of_one else local_rank
        if count <= index:
            raise ValueError(f"rank {local_rank} of this host has no GPU: there are {count}")
        device = torch.device("cuda", index)
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """What a rank gets from `launch.Ranks`: its place, the port of the store and the descriptor of the socket that
    listens there, which rank 0 serves, and the memory that all ranks share."""

    rank: int
    world_size: int
    port: int
    listener: int
    memory: mmap.mmap

    def store(self) -> dist.Store:
        """The store that the ranks meet at."""
        if self.rank != 0:
            os.close(self.listener)
            return dist.TCPStore("127.0.0.1", self.port, self.world_size, wait_for_workers=False)
        return dist.TCPStore(
            *("127.0.0.1", self.port, self.world_size),
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=self.listener,
        )


def init_process_group(device: torch.device, launched: Launched | None = None) -> None:
    """Join the group of those that were launched together, or that torchrun set up, or make a group of one; a group
    that is up already is kept.

    Raises:
        ValueError: two ranks were given the same GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        # Nobody on another host has business with the ranks of one host.
        for backend in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if launched is not None:
        rank, world_size = launched.rank, launched.world_size
        dist.init_process_group(backend, store=launched.store(), rank=rank, world_size=world_size)
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda" and dist.get_world_size() > 1:
        uuid = torch.cuda.get_device_properties(device).uuid
        check_own_gpus(gather_objects((socket.gethostname(), f"GPU-{uuid}")))


def check_own_gpus(gpus: Sequence[tuple[str, str]]) -> None:
    """`gpus` are the host and the GPU's UUID of each rank, in rank order.

    Raises:
        ValueError: two ranks have the same one, of which NCCL would only say that it was used wrongly.
    """
    ranks: dict[tuple[str, str], int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu in ranks:
            raise ValueError(
                f"ranks {ranks[gpu]} and {rank} were both given {gpu[1]} of host {gpu[0]}, but each needs one of its "
                "own: start no more ranks than there are GPUs, and set CUDA_VISIBLE_DEVICES to another GPU for each "
                "rank, or to all of them for every rank"
            )
        ranks[gpu] = rank
