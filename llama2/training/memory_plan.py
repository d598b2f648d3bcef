"""Owns how much memory a run will need, by name, before it starts.

Knows no tensors: all follows from the settings. Sizes are those of rank 0, which needs the most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from llama2.adapters.format import Target
from llama2.machine.memory_plan import CUBLAS_WORKSPACE_BYTES, KERNELS_BYTES, MIB, NCCL_BYTES, describe
from llama2.parallel.plan import FUSED
from llama2.parallel.splits import mesh_shape, share
from llama2.training.config import TrainingConfig
from llama2.training.kernels import DEQUANTIZED_VALUES
from llama2.training.loss import LOGITS_BYTES
from llama2.weights.formats.plain import Plain
from llama2.weights.spec import Spec

# Of each value that is trained, in fp32: itself, its gradient, and AdamW's two moments, which may be of 8 bits.
VALUE_BYTES = {"adamw": 16, "paged_adamw_8bit": 10}
# On a CPU, of what comes and goes: what stays with the process when it is free, between what is kept. It was seen to be
# 1.2 at most, for 3 to 30 layers.
KEPT_BY_MALLOC = 1.5
# Of each value that is being dequantized: its code, and what it is computed with and from.
DEQUANTIZING_BYTES = 24


def reserve(
    spec: Spec, targets: Mapping[str, Target], config: TrainingConfig, *, dtype: torch.dtype, degree: int, device: str
) -> dict[str, int]:
    """The bytes, by name, that one of `degree` ranks will need at most: with batches that are full."""
    args, itemsize = spec.args, dtype.itemsize
    mesh = mesh_shape(args, degree, spec.units())

    def local(axes: tuple[str, ...], sizes: tuple[int, ...]) -> int:
        return math.prod(share(axis, size, mesh, (0, 0)) for axis, size in zip(axes, sizes, strict=True))

    def size(axes: tuple[str, ...]) -> int:
        return local(axes, tuple(args.axis_sizes[axis] for axis in axes))

    axes = args.weight_axes()
    weights = sum(local(one.axes, one.shape) * one.dtype.itemsize for one in spec.tensors().values())
    trained = sum(
        target.rank * (size(axes[weight].inputs) + size(axes[weight].outputs)) for weight, target in targets.items()
    )
    # In flight, what quantized weights are as values: the largest of them, since one is needed at a time.
    values: dict[str, int] = {}
    for weight, own in axes.items():
        if own.inputs and not isinstance(spec.format(weight), Plain):
            path, dot, kind = weight.rpartition(".")
            name = path + dot + FUSED.get(kind, kind)
            values[name] = values.get(name, 0) + size(own.outputs) * size(own.inputs)
    values.pop("tok_embeddings", None)

    tokens = config.batch_size * config.max_length
    dim, hidden = args.dim, size(("hidden",))
    heads, kv_heads = size(("kv_heads", "group")), size(("kv_heads",))
    # What a layer keeps for its way back: its input and its sum, their norms, queries, keys and values, what they
    # attend to, gate and up, and their product.
    kept = 4 * dim + 2 * (heads + kv_heads) * args.head_dim + 3 * hidden
    # On the way back, at most: gradients of gate and up, of their product; or norms' in fp32.
    back = max(5 * hidden * itemsize, 5 * dim * 4, 6 * heads * args.head_dim * itemsize)
    layers = tokens * args.n_layers * (dim if config.gradient_checkpointing else kept) * itemsize
    vocab = share("vocab", args.vocab_size, mesh, (0, 0))
    logits = min(tokens * vocab * 4, LOGITS_BYTES)
    reserved = {
        "weights": weights,
        "adapter and optimizer": trained * VALUE_BYTES[config.optimizer],
        "inputs of layers" if config.gradient_checkpointing else "layers": layers,
        "one layer": tokens * (kept * itemsize + back),
        "loss": 3 * tokens * dim * itemsize + logits * (8 + itemsize) // 4,
    }
    if values:
        largest = max(values.values())
        reserved["dequantized weight"] = largest * itemsize + min(largest, DEQUANTIZED_VALUES) * DEQUANTIZING_BYTES
    if device == "cpu":
        passing = reserved["one layer"] + reserved["loss"] + (layers if config.gradient_checkpointing else 0)
        reserved["freed memory that the process keeps"] = int(KEPT_BY_MALLOC * passing)
    if device == "cuda":
        reserved |= {"cuBLAS": CUBLAS_WORKSPACE_BYTES, "kernels": KERNELS_BYTES}
        reserved |= {"NCCL": NCCL_BYTES} if degree > 1 else {}
    return reserved


def check(reserved: Mapping[str, int], free: int, config: TrainingConfig) -> None:
    """Compare with the bytes that are free.

    Raises:
        ValueError: they are too few; the message says what to change.
    """
    needed = sum(reserved.values())
    if needed <= free:
        return
    advice = [
        "gradient_checkpointing: true" if not config.gradient_checkpointing else "",
        "a smaller batch_size, with more gradient_accumulation" if config.batch_size > 1 else "a smaller max_length",
        "a checkpoint converted with --quantize nf4_double" if "dequantized weight" not in reserved else "",
        "more ranks",
    ]
    raise ValueError(
        f"this run needs {needed / MIB:.0f} MiB, and {free / MIB:.0f} MiB are free: {describe(reserved)}; try "
        f"{', or '.join(filter(None, advice))}"
    )
