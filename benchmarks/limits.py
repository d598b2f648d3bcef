"""Owns how fast the hardware lets a model run: the least bytes and operations of a step, over the measured rates.

Knows no torch and no engine. The limit is a roofline (Williams et al., doi:10.1145/1498765.1498785): a step takes at
least as long as its bytes take, and at least as long as its operations take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama2.config import ModelArgs


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The hardware's ceilings: bytes read per second, and floating-point operations per second."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Bytes of `weights` that a decoding step reads, and of one position's keys and values over all layers."""

    weights: float
    kv_per_token: float


def layer_parameters(args: ModelArgs) -> int:
    """Parameters of all layers: those that every token is multiplied by."""
    return sum(math.prod(shape) for name, shape in args.parameter_shapes().items() if name.startswith("layers."))


def read_parameters(args: ModelArgs) -> int:
    """Parameters that a decoding step reads: all but the embedding table, where it looks up one row per token.

    A head that is tied to the table is read like any other head.
    """
    shapes = args.parameter_shapes()
    return sum(math.prod(shape) for name, shape in shapes.items() if name != "tok_embeddings.weight")


def decode_seconds(args: ModelArgs, rates: Rates, sizes: Sizes, *, batch: int, context: float) -> float:
    """The least time of one decoding step: max((weights + B·L·kv) / BW, FLOP / F).

    Args:
        batch: sequences, B, each of which gains a token.
        context: positions that each of them attends to, L.
    """
    moved = sizes.weights + batch * context * sizes.kv_per_token
    attention = 4 * args.n_layers * context * args.n_heads * args.head_dim
    operations = batch * (2 * read_parameters(args) + attention)
    return max(moved / rates.bytes_per_second, operations / rates.flops_per_second)


def prefill_seconds(args: ModelArgs, rates: Rates, sizes: Sizes, *, batch: int, context: float) -> float:
    """The least time to compute `batch` prompts of `context` tokens, T: B·(2·N·T + 2·layers·T²·d) / F.

    N is the layers' parameters: the head sees one position of a prompt. Causal attention is half of T². The weights
    are read at least once, which bounds a short prompt.
    """
    attention = 2 * args.n_layers * context**2 * args.n_heads * args.head_dim
    operations = batch * (2 * layer_parameters(args) * context + attention)
    return max(sizes.weights / rates.bytes_per_second, operations / rates.flops_per_second)
