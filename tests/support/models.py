"""Models in this process, made as the engine makes them, without a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.distributed.tensor import DTensor

from llama2.config import ModelArgs
from llama2.kernels import Kernels
from llama2.model import Transformer
from llama2.parallel.collectives import Collectives, SingleRank
from llama2.parallel.plan import build_mesh
from llama2.parallel.process_group import init_process_group
from llama2.weights.loader import build_model
from llama2.weights.precision import target
from llama2.weights.spec import Spec

CPU = torch.device("cpu")


def draw(weights: Mapping[str, DTensor]) -> None:
    """Values by torch's own generator, so that activations stay near 1."""
    for weight in weights.values():
        weight.to_local().normal_(std=weight.shape[-1] ** -0.5)


def make_model(
    args: ModelArgs,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: torch.device = CPU,
    max_seq_len: int,
    collectives: Collectives | None = None,
    fill: Callable[[Mapping[str, DTensor]], None] = draw,
    quantize: str | None = None,
) -> Transformer:
    """A group of one. `quantize` as in the converter."""
    init_process_group(CPU)
    spec = target(Spec(args=args, dtype=dtype), quantize=quantize)
    return build_model(
        spec,
        build_mesh(spec, "cpu"),
        collectives or SingleRank(),
        device=device,
        max_seq_len=max_seq_len,
        threads=1,
        fill=fill,
        kernels=kernels,
    )
