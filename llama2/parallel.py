"""Owns tensor parallelism: the process group, the mesh, and THE plan.

At rest every parameter is a DTensor on a mesh of two axes, `kv` × `rep`. Up to n_kv_heads ranks, each rank holds KV
heads of its own (kv = degree, rep = 1). Beyond, each KV head is replicated on `rep` ranks, which share its query heads.
In flight parameters are plain local tensors: `localize` swaps them, once, after loading.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import empty as dtensor_empty

from llama2.collectives import Collectives
from llama2.config import ModelArgs
from llama2.model import RowLinear, Transformer, VocabEmbedding, VocabProjection
from llama2.splits import mesh_shape, split

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


def choose_device(device: str | torch.device | None = None) -> torch.device:
    """The device of this rank: as asked, else its own GPU where every rank of the host has one, else the CPU."""
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device is None:
        device = "cuda" if torch.cuda.device_count() >= local_world_size else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        if torch.cuda.device_count() <= local_rank:
            raise ValueError(f"rank {local_rank} of this host has no GPU: there are {torch.cuda.device_count()}")
        device = torch.device("cuda", local_rank)
    return device


def init_process_group(device: torch.device) -> None:
    """Join the group that torchrun set up, or make a group of one; a group that is up already is kept."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def build_mesh(args: ModelArgs, device_type: str) -> DeviceMesh:
    """The (kv, rep) mesh over the whole process group.

    Raises:
        ValueError: the model cannot be split over that many ranks; the message lists the degrees that it can take.
    """
    shape = mesh_shape(args, dist.get_world_size())
    return init_device_mesh(device_type, shape, mesh_dim_names=("kv", "rep"))


def parallelize(model: Transformer, mesh: DeviceMesh, *, dtype: torch.dtype) -> None:
    """Replace every (meta) parameter by an uninitialized DTensor in its at-rest shape, placed as PLAN says."""
    for name, shape in model.args.parameter_shapes().items():
        path, _, leaf = name.rpartition(".")
        placements = PLAN[path.rpartition(".")[2]]
        value = dtensor_empty(*shape, dtype=dtype, device_mesh=mesh, placements=placements)
        setattr(model.get_submodule(path), leaf, nn.Parameter(value, requires_grad=False))


def localize(model: Transformer, mesh: DeviceMesh, collectives: Collectives) -> None:
    """Swap every DTensor for its plain local shard in the shape that the model computes with, and connect the ranks."""
    for name, parameter in list(model.named_parameters()):
        assert isinstance(parameter, DTensor)
        path, _, leaf = name.rpartition(".")
        local = parameter.to_local()
        if path.endswith("wo"):
            local = local.flatten(1)
        elif local.dim() > 2:
            local = local.flatten(0, -2)
        setattr(model.get_submodule(path), leaf, nn.Parameter(local.contiguous(), requires_grad=False))
    kv, rep = mesh.shape
    vocab_sizes = split(model.args.vocab_size, kv, rep)
    for module in model.modules():
        if isinstance(module, (RowLinear, VocabEmbedding, VocabProjection)):
            module.collectives = collectives
        if isinstance(module, VocabEmbedding):
            module.first = sum(vocab_sizes[: collectives.rank])
        elif isinstance(module, VocabProjection):
            module.sizes = tuple(vocab_sizes)


def local_kv_heads(args: ModelArgs, mesh: DeviceMesh) -> int:
    """KV heads that this rank holds."""
    kv = mesh.shape[0]
    return split(args.n_kv_heads, kv, 1)[mesh.get_local_rank("kv")]
