"""Owns how Hugging Face's files name and lay out the weights that we have by Meta's names. Knows no file.

Shape suffixes: F outputs, C inputs.
"""

from __future__ import annotations

import math

import torch

from llama2.config import ModelArgs

_WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_OF_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(weight: str) -> str:
    """transformers' name of the weight that Meta calls `weight`, such as `layers.0.attention.wq`."""
    if weight in _WHOLE:
        return _WHOLE[weight]
    _, index, rest = weight.split(".", 2)
    return f"model.layers.{index}.{_OF_LAYER[rest]}"


def is_rotated(weight: str) -> bool:
    """Are these the weights of queries or keys, which the rotary embedding turns?"""
    return weight.endswith((".wq", ".wk"))


def pairs_from_halves(values_FC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Outputs in Meta's order from transformers'.

    The rotary embedding turns two outputs of a head together. Meta has them side by side, transformers one in the
    first half of the head and one in the second.
    """
    return values_FC.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def halves_from_pairs(values_FC: torch.Tensor, head_dim: int) -> torch.Tensor:
    """The reverse of `pairs_from_halves`."""
    return values_FC.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def hf_shapes(args: ModelArgs) -> dict[str, tuple[int, ...]]:
    """The shape in the files, (F, C) or (F,), of every weight by Meta's name."""
    sizes = args.axis_sizes
    return {
        weight: tuple(math.prod(sizes[axis] for axis in side) for side in axes if side)
        for weight, axes in args.weight_axes().items()
    }
