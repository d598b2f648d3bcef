"""Owns the way from a converted checkpoint to a model that runs: meta device, DTensor shards, DCP, plain tensors.

Knows neither how a checkpoint is made nor what the model is used for.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh

from llama2.collectives import Collectives
from llama2.config import ModelArgs
from llama2.model import Transformer
from llama2.parallel import localize, parallelize

logger = logging.getLogger(__name__)


def checkpoint_dtype(checkpoint_dir: Path | str, args: ModelArgs) -> torch.dtype:
    """Check that the checkpoint holds exactly the model's parameters, and return their dtype.

    Raises:
        ValueError: the folder is no checkpoint, or a parameter is missing, unknown, or of another shape.
    """
    stored = _read_metadata(checkpoint_dir).state_dict_metadata
    expected = args.parameter_shapes()
    for kind, names in (
        ("lacks", expected.keys() - stored.keys()),
        ("has an unknown", stored.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"checkpoint {checkpoint_dir} {kind} tensor {min(names)} ({len(names)} in all)")
    for name, shape in expected.items():
        entry = stored[name]
        if not isinstance(entry, TensorStorageMetadata) or tuple(entry.size) != shape:
            actual = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else type(entry).__name__
            raise ValueError(f"checkpoint {checkpoint_dir}: {name} is {actual}, but the model's is {shape}")
    entry = stored["tok_embeddings.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry.properties.dtype


def _read_metadata(checkpoint_dir: Path | str) -> Metadata:
    if not (Path(checkpoint_dir) / ".metadata").is_file():
        raise ValueError(f"{checkpoint_dir} is no converted checkpoint: it has no .metadata file")
    try:
        return dcp.FileSystemReader(checkpoint_dir).read_metadata()
    except Exception as error:
        raise ValueError(f"{checkpoint_dir}/.metadata cannot be read: {error}") from error


def load_model(
    checkpoint_dir: Path | str,
    args: ModelArgs,
    mesh: DeviceMesh,
    collectives: Collectives,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
) -> Transformer:
    """This rank's share of the model, in `dtype` on `device`, ready to run positions below `max_seq_len`.

    Raises:
        ValueError: the checkpoint is incomplete or damaged.
    """
    started = time.monotonic()
    checkpoint_dtype(checkpoint_dir, args)
    with torch.device("meta"):
        model = Transformer(args)
    parallelize(model, mesh, dtype=dtype)
    try:
        dcp.load(model.state_dict(), checkpoint_id=checkpoint_dir)
    except CheckpointException as error:  # a BaseException: it would pass every handler above
        failure = next(iter(error.failures.values()))[0]
        raise ValueError(f"checkpoint {checkpoint_dir} cannot be loaded: {failure}") from error
    localize(model, mesh, collectives)
    model.init_buffers(max_seq_len)
    if collectives.rank == 0:
        held = sum(parameter.nbytes for parameter in model.parameters())
        logger.info("loaded %.2f GB on rank 0 in %.1f s", held / 1e9, time.monotonic() - started)
    return model.eval()
