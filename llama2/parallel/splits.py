"""Owns the arithmetic of tensor parallelism: how an axis is cut over the ranks, and which degrees a model can take.

Knows no torch, so that a wrong degree can be refused before anything is started.
"""

from __future__ import annotations

import math

from llama2.config import ModelArgs


def mesh_shape(args: ModelArgs, degree: int) -> tuple[int, int]:
    """The (kv, rep) mesh of `degree` ranks: KV heads are split over `kv`, and each is held by `rep` ranks.

    Raises:
        ValueError: the model cannot be split over that many ranks; the message lists the degrees that it can take.
    """
    if not _fits(args, degree):
        raise ValueError(
            f"a model with {args.n_heads} heads and {args.n_kv_heads} KV heads cannot run at tensor-parallel degree "
            f"{degree}; it can at {', '.join(map(str, degrees(args)))}"
        )
    return _mesh_shape(args, degree)


def degrees(args: ModelArgs) -> list[int]:
    """Every TP degree that leaves each rank at least one head and a share of everything else, ascending."""
    return [degree for degree in range(1, args.n_heads + 1) if _fits(args, degree)]


def split(size: int, kv: int, rep: int) -> list[int]:
    """The sizes, in rank order, into which DTensor's (Shard, Shard) over a (kv, rep) mesh cuts an axis.

    As `torch.chunk` cuts it: every part but the last ones has the same size, rounded up.
    """
    return [part for outer in chunk(size, kv) for part in chunk(outer, rep)]


def _mesh_shape(args: ModelArgs, degree: int) -> tuple[int, int]:
    kv = min(degree, args.n_kv_heads)
    return kv, degree // kv


def _fits(args: ModelArgs, degree: int) -> bool:
    if degree < 1 or degree > args.n_heads or (degree > args.n_kv_heads and degree % args.n_kv_heads):
        return False
    kv, rep = _mesh_shape(args, degree)
    parts = (
        *chunk(args.n_kv_heads, kv),
        *chunk(args.group_size, rep),
        *split(args.hidden_dim, kv, rep),
        *split(args.vocab_size, kv, rep),
    )
    return 0 not in parts


def chunk(size: int, parts: int) -> list[int]:
    """The sizes into which `torch.chunk`, and so DTensor's Shard, cuts an axis; the last ones may be 0."""
    width = math.ceil(size / parts)
    return [max(0, min(width, size - index * width)) for index in range(parts)]
