"""Owns the way from options to a run: the checkpoint, the ranks, the data, the memory, the model, and the trainer.

Knows no step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from llama2.adapters.adapter import LoraPair
from llama2.adapters.format import Base, Target, targets, write_adapter
from llama2.dtypes import read_dtype
from llama2.engine.lockstep import agree
from llama2.machine.memory import free_memory
from llama2.machine.memory_plan import describe
from llama2.machine.threads import undivided
from llama2.parallel.collectives import Collectives, connect
from llama2.parallel.plan import build_mesh, local_size
from llama2.parallel.process_group import choose_device, init_process_group
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from llama2.training import memory_plan
from llama2.training.checkpoints import RunFolder
from llama2.training.collectives import TrainingCollectives
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample, Samples, read_samples, split
from llama2.training.kernels import TrainingKernels
from llama2.training.logs import check_tensorboard
from llama2.training.lora import TrainedAdapter
from llama2.training.optimizer import check_optimizer
from llama2.training.passes import Passes
from llama2.training.trainer import Result, Trainer
from llama2.weights.certificate import Identity
from llama2.weights.loader import load_model
from llama2.weights.manifest import Manifest
from llama2.weights.readers.dcp import DcpFolder

logger = logging.getLogger(__name__)

# Options that change no value that is computed: a run may be resumed with others.
_FREE_OPTIONS = (
    *("checkpoint_dir", "tokenizer_path", "data", "validation_data", "output_dir", "device"),
    *("gradient_checkpointing", "log_steps", "keep_checkpoints", "tensorboard"),
)


def finetune(config: TrainingConfig, *, resume: bool = False) -> Result:
    """Train an adapter, on every rank of the process group, which is set up here if needed.

    Raises:
        ValueError: an option, the checkpoint, the data or the degree is wrong, memory does not suffice, or a file
            cannot be written.
        LockstepError: the ranks were given different options or data.
    """
    checkpoint = DcpFolder(config.checkpoint_dir)
    spec = checkpoint.spec
    tokenizer = load_tokenizer(config.tokenizer_path or config.checkpoint_dir)
    if tokenizer.vocab_size > spec.args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {spec.args.vocab_size}: "
            "they do not belong together"
        )
    adapter_config = replace(config.adapter_config(), base_model=str(config.checkpoint_dir))
    wanted = targets(adapter_config, spec.args)
    device = choose_device(config.device)
    dtype_name = read_dtype(config.dtype)
    given = torch.bfloat16 if device.type == "cuda" or spec.dtype == torch.float16 else spec.dtype
    dtype: torch.dtype = getattr(torch, dtype_name) if dtype_name else given
    spec = replace(spec, dtype=dtype)
    check_optimizer(config, device)
    if config.tensorboard:
        check_tensorboard()
    training, validation = _read(config, tokenizer)
    weights = Identity.of(checkpoint.path).weights if Manifest.read(checkpoint.path) is not None else None

    init_process_group(device)
    rank, degree = dist.get_rank(), dist.get_world_size()
    mesh = build_mesh(spec, device.type)
    run: dict[str, Any] = {
        "base": weights,
        "data": _digest(training, validation),
        "ranks": degree,
        "dtype": str(dtype),
    }
    run |= {name: value for name, value in dataclasses.asdict(config).items() if name not in (*_FREE_OPTIONS, *run)}
    reserved = memory_plan.reserve(spec, wanted, config, dtype=dtype, degree=degree, device=device.type)

    def check_memory() -> int:
        memory_plan.check(reserved, free := free_memory(device), config)
        return free

    agree(run, check_memory)
    if rank == 0:
        trained = sum(map(len, training)), sum(sample.num_targets for sample in training)
        logger.info(
            "%d samples to learn from, of %d tokens, of which %d count; %d to validate with",
            len(training), *trained, len(validation),
        )  # fmt: skip
        logger.info("memory of each rank: %s", describe(reserved))
    folder = RunFolder(Path(config.output_dir), run)
    folder.prepare(resume=resume)
    found = folder.load() if resume else None
    if resume and found is None and rank == 0:
        logger.info("there is no checkpoint in %s: the run begins anew", config.output_dir)
    passes, adapter, collectives = load(checkpoint, wanted, config, mesh=mesh, dtype=dtype, device=device)
    trainer = Trainer(config, passes, adapter, collectives, folder, training, validation)
    if found is not None:
        trainer.resume(*found)
    base = None if weights is None else Base(weights=weights, stored=checkpoint.spec.stored())

    def write(path: Path, pairs: Mapping[str, LoraPair]) -> None:
        write_adapter(path, pairs, adapter_config, spec.args, base=base)

    return trainer.run(write)


def load(
    checkpoint: DcpFolder,
    wanted: Mapping[str, Target],
    config: TrainingConfig,
    *,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Passes, TrainedAdapter, Collectives]:
    """The model with a new adapter, ready for passes. All ranks call it."""
    spec = checkpoint.spec
    with undivided() as threads:
        collectives = connect(device)
        model = load_model(
            checkpoint,
            mesh,
            TrainingCollectives(collectives),
            dtype=dtype,
            device=device,
            max_seq_len=config.max_length,
            threads=threads,
            kernels=TrainingKernels(collectives, checkpointing=config.gradient_checkpointing),
        )
    adapter = TrainedAdapter(
        *(spec.args, wanted, mesh, spec.units(), collectives),
        dropout=config.dropout,
        seed=config.seed,
        device=device,
    )
    n_kv_heads = local_size("kv_heads", spec.args.n_kv_heads, mesh)
    return Passes(model, adapter, n_kv_heads=n_kv_heads), adapter, collectives


def _read(config: TrainingConfig, tokenizer: Tokenizer) -> tuple[list[Sample], list[Sample]]:
    samples = read_samples(config.data, tokenizer, config)
    _report(config.data, samples, config)
    if config.validation_data is None:
        return split(samples.samples, config.validation_fraction, config.seed)
    validation = read_samples(config.validation_data, tokenizer, config)
    _report(config.validation_data, validation, config)
    return list(samples.samples), list(validation.samples)


def _report(path: str, samples: Samples, config: TrainingConfig) -> None:
    for count, what in ((samples.num_cut, "cut to their ends"), (samples.num_skipped, "left out")):
        if count:
            logger.warning("%s: %d samples are longer than max_length=%d, and %s", path, count, config.max_length, what)


def _digest(*parts: Sequence[Sample]) -> str:
    hashing = hashlib.sha256()
    for samples in parts:
        for sample in samples:
            hashing.update(repr((sample.ids, sample.counts)).encode())
        hashing.update(b"end")
    return hashing.hexdigest()
