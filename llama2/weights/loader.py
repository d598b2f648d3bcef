"""Owns the way from a converted checkpoint to a model that runs: shapes, memory for this rank's share, DCP into it.

Knows neither how a checkpoint is made nor what the model is used for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from llama2.errors import InvalidValue
from llama2.kernels import Kernels, choose_kernels
from llama2.model import Transformer
from llama2.parallel.collectives import Collectives
from llama2.parallel.plan import allocate
from llama2.parallel.splits import split
from llama2.progress import progress
from llama2.weights.manifest import MANIFEST_FILE
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.spec import Spec

logger = logging.getLogger(__name__)

# Copies into a GPU's memory that are on their way at once.
GPU_STREAMS = 4


def build_model(
    spec: Spec,
    mesh: DeviceMesh,
    collectives: Collectives,
    *,
    device: torch.device,
    max_seq_len: int,
    threads: int,
    fill: Callable[[Mapping[str, DTensor]], None],
    kernels: Kernels | None = None,
) -> Transformer:
    """This rank's share of a model on `device`, ready to run positions below `max_seq_len`.

    `fill` gives the weights their values: the tensors of `spec.tensors()`, as DTensors. When it has returned, the
    kernels (None: the fastest on `device`) lay them out anew, by `threads` threads on a CPU: the DTensors are worth
    nothing from then on.
    """
    kernels = kernels or choose_kernels(device, spec.dtype)
    weights, at_rest = allocate(spec, mesh, device=device)
    fill(at_rest)
    own = {name: weights.pop(name)[0] for name in list(weights) if name == "tok_embeddings" or name.endswith("norm")}
    return Transformer(
        spec.args,
        kernels,
        collectives,
        own,
        kernels.prepare(weights, threads=threads),
        vocab_sizes=tuple(split(spec.args.vocab_size, *mesh.shape)),
        max_seq_len=max_seq_len,
    )


def load_model(
    checkpoint: DcpFolder,
    mesh: DeviceMesh,
    collectives: Collectives,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
    threads: int,
    activation_dtype: str = "auto",
    kernels: Kernels | None = None,
) -> Transformer:
    """`build_model` with a checkpoint's weights, read by `threads` threads on a CPU. `activation_dtype` is for the
    kernels that are chosen where none are given.

    Raises:
        ValueError: a file of the checkpoint is damaged.
        InvalidValue: `activation_dtype` is for quantized weights, or not for this device.
    """
    started = time.monotonic()
    if activation_dtype != "auto" and not checkpoint.spec.formats:
        raise InvalidValue(
            "activation_dtype", f"{activation_dtype} is for quantized weights, and those of {checkpoint.path} are not"
        )
    kernels = kernels or choose_kernels(device, dtype, activation_dtype)
    if collectives.rank == 0 and not checkpoint.has_hashes:
        logger.warning(
            "%s has no %s: damage to it would go unnoticed; convert it again to have one",
            checkpoint.path, MANIFEST_FILE,
        )  # fmt: skip
    sizes: list[int] = []

    def fill(at_rest: Mapping[str, DTensor]) -> None:
        sizes.extend(share.to_local().nbytes for share in at_rest.values())
        streams = GPU_STREAMS if device.type == "cuda" else threads
        quiet = collectives.rank != 0
        with progress(total=sum(sizes), desc="loading", unit="B", unit_scale=True, delay=2, disable=quiet) as bar:
            checkpoint.load(at_rest, threads=streams, progress=bar.update)

    model = build_model(
        replace(checkpoint.spec, dtype=dtype),
        mesh,
        collectives,
        device=device,
        max_seq_len=max_seq_len,
        threads=threads,
        fill=fill,
        kernels=kernels,
    )
    if collectives.rank == 0:
        logger.info("loaded %.2f GB on rank 0 in %.1f s", sum(sizes) / 1e9, time.monotonic() - started)
    return model
