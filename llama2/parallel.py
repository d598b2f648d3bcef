"""Owns tensor parallelism: the process group, the mesh, and THE plan.

At rest every parameter is a DTensor on a mesh of two axes, `kv` × `rep`. Up to n_kv_heads ranks, each rank holds KV
heads of its own (kv = degree, rep = 1). Beyond, each KV head is replicated on `rep` ranks, which share its query heads.
In flight parameters are plain local tensors, some of them fused. Both are the same memory, until the kernels lay it out
as they like (`Kernels.prepare`).
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llama2.collectives import Collectives
from llama2.config import ModelArgs
from llama2.memory import empty
from llama2.model import RowLinear, Transformer, VocabEmbedding, VocabProjection
from llama2.splits import chunk, mesh_shape, split

logger = logging.getLogger(__name__)

# What each parameter's at-rest axes (ModelArgs.parameter_shapes) do over the mesh axes (kv, rep).
PLAN: dict[str, tuple[Placement, Placement]] = {
    "tok_embeddings": (Shard(0), Shard(0)),
    "wq": (Shard(0), Shard(1)),
    "wk": (Shard(0), Replicate()),
    "wv": (Shard(0), Replicate()),
    "wo": (Shard(1), Shard(2)),
    "w1": (Shard(0), Shard(0)),
    "w2": (Shard(1), Shard(1)),
    "w3": (Shard(0), Shard(0)),
    "attention_norm": (Replicate(), Replicate()),
    "ffn_norm": (Replicate(), Replicate()),
    "norm": (Replicate(), Replicate()),
    "output": (Shard(0), Shard(0)),
}

# Parameters that are one in flight, one's rows after the other's.
FUSED = {"wqkv": ("wq", "wk", "wv"), "w13": ("w1", "w3")}


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


def init_process_group(device: torch.device) -> None:
    """Join the group that torchrun set up, or make a group of one; a group that is up already is kept.

    Raises:
        ValueError: two ranks were given the same GPU.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if device.type == "cuda" and dist.get_world_size() > 1:
        gpus: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gpus, (socket.gethostname(), f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
        check_own_gpus(gpus)


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


def build_mesh(args: ModelArgs, device_type: str) -> DeviceMesh:
    """The (kv, rep) mesh over the whole process group.

    Raises:
        ValueError: the model cannot be split over that many ranks; the message lists the degrees that it can take.
    """
    shape = mesh_shape(args, dist.get_world_size())
    return init_device_mesh(device_type, shape, mesh_dim_names=("kv", "rep"))


def allocate(model: Transformer, mesh: DeviceMesh, *, dtype: torch.dtype, device: torch.device) -> dict[str, DTensor]:
    """Give every (meta) parameter its uninitialized share on this rank.

    Returns the same memory at rest: by Meta's names, in the at-rest shapes, as DTensors placed as PLAN says. Whatever
    fills them, fills the model, as long as `Kernels.prepare` has not been called.
    """
    shapes = model.args.parameter_shapes()
    shares: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, _ in model.named_parameters():
        path, leaf = name.rsplit(".", 1)
        *prefix, kind = path.split(".")
        at_rest_names = [".".join((*prefix, part, leaf)) for part in FUSED.get(kind, (kind,))]
        shares[name] = {part: _local_shape(shapes[part], _placements(part), mesh) for part in at_rest_names}
    # One piece of memory for all, in which each begins at a cache line's border.
    line = 64 // dtype.itemsize
    sizes = [sum(map(math.prod, share.values())) for share in shares.values()]
    memory = empty(sum(size + -size % line for size in sizes), dtype=dtype, device=device)
    at_rest: dict[str, DTensor] = {}
    for (name, share), size, piece in zip(
        shares.items(), sizes, memory.split([size + -size % line for size in sizes]), strict=True
    ):
        values = piece[:size]
        for (part, local), view in zip(share.items(), values.split(list(map(math.prod, share.values()))), strict=True):
            whole = torch.Size(shapes[part])
            at_rest[part] = DTensor.from_local(
                view.view(local), mesh, _placements(part), run_check=False, shape=whole, stride=_strides(whole)
            )
        path, leaf = name.rsplit(".", 1)
        in_flight = _in_flight_shape(name, next(iter(share.values())))
        setattr(model.get_submodule(path), leaf, nn.Parameter(values.view(in_flight), requires_grad=False))
    return at_rest


def connect(model: Transformer, mesh: DeviceMesh, collectives: Collectives) -> None:
    """Tell the layers that need the other ranks how to reach them, and what share of the vocabulary is whose."""
    kv, rep = mesh.shape
    vocab_sizes = split(model.args.vocab_size, kv, rep)
    for module in model.modules():
        if isinstance(module, (RowLinear, VocabEmbedding, VocabProjection)):
            module.collectives = collectives
        if isinstance(module, VocabEmbedding):
            module.first = sum(vocab_sizes[: collectives.rank])
        elif isinstance(module, VocabProjection):
            module.sizes = tuple(vocab_sizes)


def _placements(name: str) -> tuple[Placement, Placement]:
    return PLAN[name.split(".")[-2]]


def _in_flight_shape(name: str, local: tuple[int, ...]) -> tuple[int, ...]:
    """Matrices have two axes: the outputs, of however many fused parameters, and the inputs."""
    if len(local) == 1:
        return local
    return (local[0], math.prod(local[1:])) if name.endswith("wo.weight") else (-1, local[-1])


def _local_shape(shape: tuple[int, ...], placements: tuple[Placement, ...], mesh: DeviceMesh) -> tuple[int, ...]:
    local = list(shape)
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            local[placement.dim] = chunk(local[placement.dim], mesh.size(axis))[mesh.get_local_rank(axis)]
    return tuple(local)


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def local_kv_heads(args: ModelArgs, mesh: DeviceMesh) -> int:
    """KV heads that this rank holds."""
    kv = mesh.shape[0]
    return chunk(args.n_kv_heads, kv)[mesh.get_local_rank("kv")]
