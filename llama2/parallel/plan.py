"""Owns the ranks' shares of the weights: the mesh, and the memory that PLAN gives this rank.

At rest every tensor is a DTensor on a mesh of two axes, `kv` × `rep`. Up to n_kv_heads ranks, each rank holds KV heads
of its own (kv = degree, rep = 1). Beyond, each KV head is replicated on `rep` ranks, which share its query heads. In
flight weights are plain local tensors, some of them fused. Both are the same memory, until the kernels lay it out as
they like (`Kernels.prepare`).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from llama2.machine.memory import empty
from llama2.parallel.splits import PLAN, mesh_shape, portion, share
from llama2.weights.formats import Format, Weight
from llama2.weights.spec import Spec

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
    return share(axis, size, mesh.shape, _place(mesh))


def local_portion(axis: str, size: int, mesh: DeviceMesh, unit: int = 1) -> slice:
    """What this rank has of an axis of `size`, which is cut between units of it."""
    own = portion(axis, size // unit, mesh.shape, _place(mesh))
    return slice(own.start * unit, own.stop * unit)


def _place(mesh: DeviceMesh) -> list[int]:
    return [mesh.get_local_rank(cut) for cut in ("kv", "rep")]


def allocate(
    spec: Spec, mesh: DeviceMesh, *, device: torch.device
) -> tuple[dict[str, tuple[Weight, ...]], dict[str, DTensor]]:
    """This rank's share of all weights, uninitialized: in flight, by names such as `layers.0.attention.wqkv`.

    What is one in flight is several weights where formats differ, one's outputs after the other's.

    And the same memory at rest: by the names and in the shapes of `spec.tensors()`, as DTensors placed as PLAN says.
    Whatever fills them, fills the weights in flight, until `Kernels.prepare` is called.

    Raises:
        ValueError: a format cannot hold a weight.
    """
    tensors = spec.tensors()
    local = {
        name: tuple(local_size(axis, size, mesh) for axis, size in zip(one.axes, one.shape, strict=True))
        for name, one in tensors.items()
    }
    # Parts in flight by weight, place in it and name, and the parts at rest that they consist of.
    fused: dict[tuple[str, int, str], list[str]] = {}
    formats: dict[str, list[Format]] = {}
    for name in tensors:
        weight, _, part = name.rpartition(".")
        path, dot, kind = weight.rpartition(".")
        in_flight, own_format = path + dot + FUSED.get(kind, kind), spec.format(weight)
        own_formats = formats.setdefault(in_flight, [])
        if own_formats[-1:] != [own_format]:
            own_formats.append(own_format)
        fused.setdefault((in_flight, len(own_formats) - 1, part), []).append(name)
    # One piece of memory for all, in which each part in flight begins at a cache line's border.
    sizes = [sum(math.prod(local[name]) * tensors[name].dtype.itemsize for name in names) for names in fused.values()]
    padded = [size + -size % LINE_BYTES for size in sizes]
    memory = empty(sum(padded), dtype=torch.uint8, device=device).split(padded)
    parts: dict[str, list[dict[str, torch.Tensor]]] = {name: [{} for _ in own] for name, own in formats.items()}
    at_rest: dict[str, DTensor] = {}
    for ((weight, place, part), names), size, piece in zip(fused.items(), sizes, memory, strict=True):
        first = tensors[names[0]]
        values = piece[:size].view(first.dtype)
        for name, view in zip(names, values.split([math.prod(local[name]) for name in names]), strict=True):
            shape, stride = tensors[name].shape, torch.empty(tensors[name].shape, device="meta").stride()
            at_rest[name] = DTensor.from_local(
                view.view(local[name]),
                mesh,
                _placements(tensors[name].axes),
                run_check=False,
                shape=torch.Size(shape),
                stride=stride,
            )
        outputs = sum(math.prod(local[name][: tensors[name].num_outputs]) for name in names)
        has_inputs = first.axes[first.num_outputs :]
        parts[weight][place][part] = values.view(outputs, -1) if has_inputs else values
    weights = {
        name: tuple(Weight(format=one, parts=its) for one, its in zip(own, parts[name], strict=True))
        for name, own in formats.items()
    }
    return weights, at_rest


def _placements(axes: tuple[str, ...]) -> tuple[Placement, ...]:
    """What PLAN does to a tensor over the mesh axes (kv, rep)."""
    cut = {one: index for index, axis in enumerate(axes) for one in PLAN.get(axis, ())}
    return tuple(Shard(cut[one]) if one in cut else Replicate() for one in ("kv", "rep"))
