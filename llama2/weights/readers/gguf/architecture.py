"""Owns what the metadata of a GGUF file says about the architecture, as `ModelArgs`. Knows no tensor's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from llama2.config import ModelArgs
from llama2.rope import ScaledRope
from llama2.weights.readers.gguf.header import StoredTensor
from llama2.weights.readers.gguf.metadata import Metadata
from llama2.weights.readers.gguf.rotary import recognize

# By which the frequencies of the rotary embedding are divided; no weight.
ROPE_DIVISORS = "rope_freqs.weight"
_ARCHITECTURE = "llama"
# What changes the arithmetic in a way that is not computed here, unless it has this value.
_NEUTRAL = {
    "expert_count": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
}


def read_args(metadata: Metadata, tensors: Mapping[str, StoredTensor]) -> ModelArgs:
    """The architecture; the vocabulary is as large as the embedding.

    Raises:
        ValueError: it is no Llama model, or one that is computed in a way not known here.
    """
    path, said = metadata.path, f"{metadata.path}: {_ARCHITECTURE}"
    architecture = metadata.get("general.architecture", str)
    if architecture != _ARCHITECTURE:
        raise ValueError(f"{path}: architecture must be {_ARCHITECTURE!r}, got {architecture!r}")
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(f"{_ARCHITECTURE}.{key}", float, neutral)
        if value != neutral:
            raise ValueError(f"{said}.{key} is {value:g}, and such models are not supported")

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{_ARCHITECTURE}.{key}", int, default)
        if value < 1:
            raise ValueError(f"{said}.{key} must be positive, got {value}")
        return value

    def number(key: str, default: float | None = None) -> float:
        # The file holds fp32: the shortest decimal of that number is what was meant (1e-05, not 9.99999974e-06).
        return float(str(np.float32(metadata.get(f"{_ARCHITECTURE}.{key}", float, default))))

    dim, n_heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            raise ValueError(f"{said}.{key} must be the size of a head, {head_dim}, got {integer(key)}")
    context_length = integer("context_length") if f"{_ARCHITECTURE}.context_length" in metadata else None
    window = metadata.get(f"{_ARCHITECTURE}.attention.sliding_window", int, 0)
    if 0 < window < (context_length or window + 1):
        raise ValueError(f"{said}.attention.sliding_window is {window}, and such models are not supported")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{path}: tensor 'token_embd.weight' is missing")
    fields: dict[str, Any] = {
        "dim": dim,
        "n_layers": integer("block_count"),
        "n_heads": n_heads,
        "n_kv_heads": integer("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_dim": integer("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "context_length": context_length,
        "rope_scaling": _linear_factor(metadata),
    }
    try:
        args = ModelArgs(**fields)
        divisors = tensors.get(ROPE_DIVISORS)
        return args if divisors is None else replace(args, scaled_rope=_scaled_rope(args, divisors))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _scaled_rope(args: ModelArgs, divisors: StoredTensor) -> ScaledRope | None:
    if (divisors.type, divisors.shape) != (GGMLQuantizationType.F32, (args.head_dim // 2,)):
        raise ValueError(
            f"tensor {ROPE_DIVISORS!r} must have {args.head_dim // 2} values in F32, got the shape {divisors.shape} in "
            f"{divisors.type.name}"
        )
    return recognize(divisors.data.view("<f4")[0], args.rope_theta)


def _linear_factor(metadata: Metadata) -> float:
    """What positions are divided by. Older files have no type beside it."""
    old = metadata.get(f"{_ARCHITECTURE}.rope.scale_linear", float, 1.0)
    kind = metadata.get(f"{_ARCHITECTURE}.rope.scaling.type", str, "none" if old == 1 else "linear")
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{metadata.path}: rotary scaling {kind!r} is not supported, only linear and that of Llama 3.1 are"
        )
    return metadata.get(f"{_ARCHITECTURE}.rope.scaling.factor", float, old) if kind == "linear" else 1.0
