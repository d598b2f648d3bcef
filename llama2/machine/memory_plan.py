"""Owns how a GPU's memory is divided once the weights are in it: what the steps will need, by name.

Knows no tensors: all follows from the settings, so that what does not fit is refused before anything is allocated.
Sizes are those of rank 0, which needs the most; the other ranks use the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llama2.config import EngineConfig, ModelArgs
from llama2.parallel.splits import mesh_shape, split

MIB = 1 << 20
# A recording's own memory, without its tensors.
RECORDING_BYTES = 4 * MIB
# Positions whose attention is summed separately: SPLIT of llama2/kernels/cuda/attention.py.
ATTENTION_PIECE = 256
# Per logit of a sampled row: copies with biases, penalties and masks, weights, and intermediates.
SAMPLING_BYTES = 32
# What cuBLAS takes per stream on a Hopper GPU; less elsewhere.
CUBLAS_WORKSPACE_BYTES = 32 * MIB
# Code is loaded onto the GPU when a kernel first runs.
KERNELS_BYTES = 256 * MIB
NCCL_BYTES = 512 * MIB
# Values of quantized weights, one slice after the other, for products with many rows. Set up with the weights.
DEQUANTIZED_BYTES = 64 * MIB
# The driver allocates multiples of this, for each layer's keys and for its values, and for the scales of codes.
PAGE_BYTES = 2 * MIB


def reserve(args: ModelArgs, config: EngineConfig, *, dtype: torch.dtype, degree: int) -> dict[str, int]:
    """The bytes, by name, that one of `degree` GPUs will need besides its weights, the rotary table and the KV cache.

    What the ranks set up before loading the weights, such as the symmetric memory buffer, is already in use.
    """
    itemsize, vocab_size = dtype.itemsize, args.vocab_size
    # On rank 0: the ranks' parts, then all concatenated, in `dtype`; then in fp32.
    per_row = vocab_size * (2 * itemsize + 4)
    attention = _attention_bytes(args, config, degree=degree)
    reserved = {
        "activations": _activation_bytes(args, config.max_step_tokens, dtype=dtype, degree=degree),
        "attention": attention,
        "logits": config.max_batch_size * per_row,
        "sampling": config.max_batch_size * vocab_size * SAMPLING_BYTES,
        # A request may ask for the log-probabilities of its prompt.
        "logits of prompts": config.max_step_tokens * (per_row + 4 * vocab_size),
        "cuBLAS": CUBLAS_WORKSPACE_BYTES * (2 if config.cuda_graphs else 1),
        "kernels": KERNELS_BYTES,
        "pages of the KV cache": (2 if config.kv_cache_dtype == "auto" else 4) * args.n_layers * PAGE_BYTES,
    }
    if config.cuda_graphs:
        reserved["CUDA graphs"] = (
            _activation_bytes(args, config.recorded_tokens, dtype=dtype, degree=degree)
            + attention
            # The latest logits stay where they are until they are sampled.
            + config.max_batch_size * (per_row + 4 * vocab_size)
            + RECORDING_BYTES * (config.max_batch_size // 8 + 8)
        )
    if degree > 1:
        reserved["NCCL"] = NCCL_BYTES
    return reserved


def describe(reserved: Mapping[str, int]) -> str:
    """The names and their MiB, the largest first."""
    largest_first = sorted(reserved.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in largest_first)


def _local_heads(args: ModelArgs, degree: int) -> tuple[int, int]:
    """Query heads and KV heads."""
    kv, rep = mesh_shape(args, degree)
    kv_heads = split(args.n_kv_heads, kv)[0]
    return kv_heads * split(args.group_size, rep)[0], kv_heads


def _activation_bytes(args: ModelArgs, tokens: int, *, dtype: torch.dtype, degree: int) -> int:
    """Of one layer: those of the previous one are freed."""
    heads, kv_heads = _local_heads(args, degree)
    hidden = split(args.hidden_dim, *mesh_shape(args, degree))[0]
    features = (
        4 * args.dim  # the residual stream, its branch, their norm, and a sum over the ranks
        + (heads + 2 * kv_heads) * args.head_dim  # qkv
        + 2 * heads * args.head_dim  # rotated queries, and what they attend to
        + 3 * hidden  # gate and up, and their product
    )
    rope_and_ids = 4 * args.head_dim + 64
    return tokens * (features * dtype.itemsize + rope_and_ids)


def _attention_bytes(args: ModelArgs, config: EngineConfig, *, degree: int) -> int:
    """For decoding: each piece of a context gives a weighted sum and two softmax terms, in fp32, per query head."""
    pieces = -(-config.blocks_per_sequence * config.block_size // ATTENTION_PIECE)
    return config.max_batch_size * _local_heads(args, degree)[0] * pieces * (args.head_dim + 2) * 4
