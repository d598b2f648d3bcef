"""Owns the ranks' shares of the weights: the mesh, and the memory that PLAN gives this rank.

At rest every tensor is a DTensor on a mesh of two axes, `kv` × `rep`. Up to n_kv_heads ranks, each rank holds KV heads
of its own (kv = degree, rep = 1). Beyond, each KV head is replicated on `rep` ranks, which share its query heads. In
flight weights are plain local tensors, some of them fused. Both are the same memory, until the kernels lay it out as
they like (`Kernels.prepare`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llama2.machine.memory import empty
from llama2.parallel.splits import PLAN, mesh_shape, split
from llama2.weights.formats import Weight
from llama2.weights.spec import Spec, WeightSpec

# Weights that are one in flight, one's outputs after the other's.
FUSED = {"wq": "wqkv", "wk": "wqkv", "wv": "wqkv", "w1": "w13", "w3": "w13"}

# Each tensor begins at a cache line's border.
LINE_BYTES = 64


def build_mesh(spec: Spec, device_type: str) -> DeviceMesh:
    """The (kv, rep) mesh over the whole process group.

    Raises:
        ValueError: the model cannot be split over that many ranks; the message lists the degrees that it can take.
    """
    shape = mesh_shape(spec.args, dist.get_world_size(), spec.units())
    return init_device_mesh(device_type, shape, mesh_dim_names=("kv", "rep"))


def local_size(axis: str, size: int, mesh: DeviceMesh) -> int:
    """This rank's share of an axis of `size`."""
    index, parts = 0, []
    for cut, ranks in zip(("kv", "rep"), mesh.shape, strict=True):
        if cut in PLAN.get(axis, ()):
            index = index * ranks + mesh.get_local_rank(cut)
            parts.append(ranks)
    return split(size, *parts)[index]


def allocate(spec: Spec, mesh: DeviceMesh, *, device: torch.device) -> tuple[dict[str, Weight], dict[str, DTensor]]:
    """This rank's share of all weights, uninitialized: in flight, by names such as `layers.0.attention.wqkv`.

    And the same memory at rest: by the names and in the shapes of `spec.tensors()`, as DTensors placed as PLAN says.
    Whatever fills them, fills the weights in flight, until `Kernels.prepare` is called.
    """
    in_flight: dict[str, dict[str, WeightSpec]] = {}
    for name, weight in spec.weights().items():
        path, dot, kind = name.rpartition(".")
        in_flight.setdefault(path + dot + FUSED.get(kind, kind), {})[name] = weight
    shares = {
        (name, part): [_share(f"{member}.{part}", weight, part, mesh) for member, weight in members.items()]
        for name, members in in_flight.items()
        for part in next(iter(members.values())).parts
    }
    # One piece of memory for all, in which each tensor in flight begins at a cache line's border.
    sizes = [sum(share.nbytes for share in members) for members in shares.values()]
    padded = [size + -size % LINE_BYTES for size in sizes]
    memory = empty(sum(padded), dtype=torch.uint8, device=device).split(padded)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    at_rest: dict[str, DTensor] = {}
    for ((name, part), members), size, piece in zip(shares.items(), sizes, memory, strict=True):
        values = piece[:size].view(members[0].dtype)
        outputs = sum(share.outputs for share in members)
        parts.setdefault(name, {})[part] = values.view(outputs, -1) if members[0].has_inputs else values
        for share, view in zip(members, values.split([math.prod(share.local) for share in members]), strict=True):
            at_rest[share.name] = DTensor.from_local(
                view.view(share.local),
                mesh,
                share.placements,
                run_check=False,
                shape=torch.Size(share.shape),
                stride=tuple(math.prod(share.shape[axis + 1 :]) for axis in range(len(share.shape))),
            )
    weights = {name: Weight(format=spec.format(next(iter(in_flight[name]))), parts=own) for name, own in parts.items()}
    return weights, at_rest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Of one tensor at rest, what this rank holds."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    local: tuple[int, ...]
    num_outputs: int
    placements: tuple[Placement, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.local) * self.dtype.itemsize

    @property
    def outputs(self) -> int:
        return math.prod(self.local[: self.num_outputs])

    @property
    def has_inputs(self) -> bool:
        return len(self.local) > self.num_outputs


def _share(name: str, weight: WeightSpec, part: str, mesh: DeviceMesh) -> _Share:
    shape, dtype = weight.parts[part]
    axes = (*weight.axes.outputs, *weight.axes.inputs)[: len(shape)]
    cut = {one: index for index, axis in enumerate(axes) for one in PLAN.get(axis, ())}
    return _Share(
        name=name,
        dtype=dtype,
        shape=shape,
        local=tuple(local_size(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)),
        num_outputs=len(weight.axes.outputs),
        placements=tuple(Shard(cut[one]) if one in cut else Replicate() for one in mesh.mesh_dim_names or ()),
    )
