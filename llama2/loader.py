"""Owns the way from a converted checkpoint to a model that runs: shapes, memory for this rank's share, DCP into it.

Knows neither how a checkpoint is made nor what the model is used for.
"""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from llama2.checkpoint.dcp import DcpFolder
from llama2.checkpoint.mapped import MappedReader
from llama2.collectives import Collectives
from llama2.kernels import choose_kernels
from llama2.model import Transformer
from llama2.parallel import allocate, connect

logger = logging.getLogger(__name__)


def load_model(
    checkpoint: DcpFolder,
    mesh: DeviceMesh,
    collectives: Collectives,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_seq_len: int,
) -> Transformer:
    """This rank's share of the model, in `dtype` on `device`, ready to run positions below `max_seq_len`.

    Raises:
        ValueError: a file of the checkpoint is damaged.
    """
    started = time.monotonic()
    with torch.device("meta"):
        model = Transformer(checkpoint.args, choose_kernels(device, dtype))
    at_rest = allocate(model, mesh, dtype=dtype, device=device)
    try:
        with tqdm(
            total=sum(parameter.nbytes for parameter in model.parameters()),
            desc="loading",
            unit="B",
            unit_scale=True,
            delay=2,
            disable=collectives.rank != 0,
        ) as bar:
            dcp.load(at_rest, storage_reader=MappedReader(checkpoint.folder, bar.update))
    except CheckpointException as error:  # a BaseException: it would pass every handler above
        failure = next(iter(error.failures.values()))[0]
        raise ValueError(f"checkpoint {checkpoint.folder} cannot be loaded: {failure}") from error
    connect(model, mesh, collectives)
    model.finish(max_seq_len)
    if collectives.rank == 0:
        held = sum(parameter.nbytes for parameter in model.parameters())
        logger.info("loaded %.2f GB on rank 0 in %.1f s", held / 1e9, time.monotonic() - started)
    return model.eval()
