"""Owns tensor parallelism: the process group, the mesh, and THE plan.

At rest every parameter is a DTensor on a mesh of two axes, `kv` × `rep`. Up to n_kv_heads ranks, each rank holds KV
heads of its own (kv = degree, rep = 1). Beyond, each KV head is replicated on `rep` ranks, which share its query heads.
In flight parameters are plain local tensors, some of them fused. Both are the same memory, until the kernels lay it out
as they like (`Kernels.prepare`).
"""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llama2.config import ModelArgs
from llama2.machine.memory import empty
from llama2.model import RowLinear, Transformer, VocabEmbedding, VocabProjection
from llama2.parallel.collectives import Collectives
from llama2.parallel.splits import chunk, mesh_shape, split

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
