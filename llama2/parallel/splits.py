"""Owns the arithmetic of tensor parallelism: THE plan, how it cuts an axis, and which degrees a model can take.

Knows no torch, so that a wrong degree can be refused before anything is started.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from llama2.config import ModelArgs

# The ranks form a mesh of two axes, (kv, rep). Here is which of them cut a logical axis of the weights
# (ModelArgs.weight_axes), the first one first. All other axes are whole on every rank.
PLAN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "kv_heads": ("kv",),
        "group": ("rep",),
        "hidden": ("kv", "rep"),
        "vocab": ("kv", "rep"),
    }
)


def mesh_shape(args: ModelArgs, degree: int, units: Mapping[str, int] = MappingProxyType({})) -> tuple[int, int]:
    """The (kv, rep) mesh of `degree` ranks: KV heads are split over `kv`, and each is held by `rep` ranks.

    `units` are those of the axes that a format of the weights does not let be cut anywhere (`Spec.units`).

    Raises:
        ValueError: the model cannot be split over that many ranks; the message lists the degrees that it can take.
    """
    if not _fits(args, degree, units):
        whole = "".join(f", its {axis} in groups of {unit}," for axis, unit in units.items())
        raise ValueError(
            f"a model with {args.n_heads} heads and {args.n_kv_heads} KV heads{whole} cannot run at tensor-parallel "
            f"degree {degree}; it can at {', '.join(map(str, degrees(args, units)))}"
        )
    return _mesh_shape(args, degree)


def degrees(args: ModelArgs, units: Mapping[str, int] = MappingProxyType({})) -> list[int]:
    """Every TP degree that leaves each rank at least one head and a share of everything else, ascending."""
    # No machine has more ranks, but a damaged file may say any number of heads.
    return [degree for degree in range(1, min(args.n_heads, 4096) + 1) if _fits(args, degree, units)]


def split(size: int, *parts: int) -> list[int]:
    """The sizes, in rank order, into which DTensor's Shard over one or several mesh axes of `parts` ranks cuts an axis.

    As `torch.chunk` cuts it, once for each mesh axis: every part but the last ones has the same size, rounded up. The
    last ones may be 0.
    """
    sizes = [size]
    for count in parts:
        sizes = [
            max(0, min(width, outer - index * width))
            for outer in sizes
            for width in [math.ceil(outer / count)]
            for index in range(count)
        ]
    return sizes


def share(axis: str, size: int, mesh: Sequence[int], place: Sequence[int]) -> int:
    """How much of an axis of `size` the rank at `place`, its coordinates, of a (kv, rep) mesh of that shape has."""
    own = portion(axis, size, mesh, place)
    return own.stop - own.start


def portion(axis: str, size: int, mesh: Sequence[int], place: Sequence[int]) -> slice:
    """What of an axis it has."""
    index, parts = 0, []
    for cut, ranks, at in zip(("kv", "rep"), mesh, place, strict=True):
        if cut in PLAN.get(axis, ()):
            index = index * ranks + at
            parts.append(ranks)
    sizes = split(size, *parts)
    start = sum(sizes[:index])
    return slice(start, start + sizes[index])


def _mesh_shape(args: ModelArgs, degree: int) -> tuple[int, int]:
    kv = min(degree, args.n_kv_heads)
    return kv, degree // kv


def _fits(args: ModelArgs, degree: int, units: Mapping[str, int]) -> bool:
    if degree < 1 or degree > args.n_heads or (degree > args.n_kv_heads and degree % args.n_kv_heads):
        return False
    mesh, sizes = dict(zip(("kv", "rep"), _mesh_shape(args, degree), strict=True)), args.axis_sizes
    return all(
        0 not in split(sizes[axis] // units.get(axis, 1), *(mesh[cut] for cut in cuts)) for axis, cuts in PLAN.items()
    )
