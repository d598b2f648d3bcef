"""Owns building an engine, from a converted checkpoint or from a loaded model. Runs no step."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama2.adapters.format import Base
from llama2.adapters.slots import AdapterSlots
from llama2.adapters.store import AdapterStore
from llama2.config import LORA_RANK, EngineConfig, ModelArgs
from llama2.dtypes import read_dtype
from llama2.engine.engine import Engine
from llama2.engine.lockstep import Lockstep, agree
from llama2.engine.runner import Runner
from llama2.engine.sampler import warm_up
from llama2.kv_cache import KVCache, cache_dtype, choose_batch_size, count_blocks
from llama2.machine.threads import undivided
from llama2.model import Transformer
from llama2.parallel.collectives import Collectives, connect
from llama2.parallel.plan import build_mesh, local_size
from llama2.parallel.process_group import Launched, choose_device, init_process_group
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from llama2.weights.certificate import Identity
from llama2.weights.loader import load_model
from llama2.weights.origin import SORTED, read_origin
from llama2.weights.readers.dcp import DcpFolder

logger = logging.getLogger(__name__)


def load_engine(
    checkpoint_dir: Path | str,
    *,
    tokenizer_path: Path | str | None = None,
    model_args_path: Path | str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    config: EngineConfig,
    launched: Launched | None = None,
) -> Engine:
    """Load a converted checkpoint over all ranks of the process group, which is set up here if needed.

    `dtype` is torch's or one of its names (`read_dtype`), and defaults to bf16 on a GPU and to the checkpoint's own on
    a CPU. Called on every rank. `launched` is for ranks that `launch.Ranks` has
    started.

    Raises:
        ValueError: the checkpoint, the tokenizer, the degree or a size is wrong.
        LockstepError: the ranks were given different settings.
    """
    dtype_name = read_dtype(dtype)
    args = ModelArgs.load(model_args_path) if model_args_path else None
    checkpoint = DcpFolder(checkpoint_dir, args, rope_scaling=config.rope_scaling)
    args = checkpoint.spec.args
    tokenizer = load_tokenizer(tokenizer_path or checkpoint_dir)
    if tokenizer.vocab_size > args.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {args.vocab_size}: "
            "they do not belong together"
        )
    config = config.for_model(args)
    device = choose_device(device)
    given = torch.bfloat16 if device.type == "cuda" else checkpoint.spec.dtype
    dtype = getattr(torch, dtype_name) if dtype_name else given
    init_process_group(device, launched)
    mesh = build_mesh(checkpoint.spec, device.type)
    with undivided() as threads:
        collectives = connect(
            device, symm_mem_all_reduce=config.symm_mem_all_reduce, memory=None if launched is None else launched.memory
        )
        model = load_model(
            checkpoint,
            mesh,
            collectives,
            dtype=dtype,
            device=device,
            max_seq_len=config.max_seq_len,
            threads=threads,
            activation_dtype=config.activation_dtype,
        )
        adapters = _make_store(checkpoint, mesh, config, dtype, device) if config.max_loras else None
        return build_engine(model, mesh, collectives, tokenizer=tokenizer, config=config, adapters=adapters)


def _make_store(
    checkpoint: DcpFolder, mesh: DeviceMesh, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> AdapterStore:
    """Room for adapters, which the memory that is free afterwards does not have."""
    spec = checkpoint.spec
    slots = AdapterSlots(
        spec.args,
        mesh,
        spec.units(),
        num_slots=config.max_loras,
        max_rank=config.max_lora_rank or LORA_RANK,
        dtype=dtype,
        device=device,
    )
    base = Base(weights=Identity.of(checkpoint.path).weights, stored=spec.stored()) if checkpoint.has_hashes else None
    return AdapterStore(spec.args, slots, base, is_sorted=SORTED in read_origin(checkpoint.path))


def build_engine(
    model: Transformer,
    mesh: DeviceMesh,
    collectives: Collectives,
    *,
    tokenizer: Tokenizer,
    config: EngineConfig,
    adapters: AdapterStore | None = None,
) -> Engine:
    """An engine for a model that can run positions up to `config.max_seq_len`. Called on every rank.

    Raises:
        ValueError: the memory of some rank does not hold one sequence of that length.
        LockstepError: the ranks were given different settings.
    """
    args, dtype, device = model.args, model.dtype, model.device
    n_kv_heads = local_size("kv_heads", args.n_kv_heads, mesh)
    degree = collectives.world_size
    if config.max_batch_size is None:
        asked = config
        size = agree(
            (args, asked, dtype, tokenizer.vocab_size),
            lambda: choose_batch_size(args, asked, n_kv_heads=n_kv_heads, dtype=dtype, device=device, degree=degree),
        )
        config = replace(config, max_batch_size=size)
    num_blocks = agree(
        (args, config, dtype, tokenizer.vocab_size),
        lambda: count_blocks(
            args,
            config,
            n_kv_heads=n_kv_heads,
            dtype=dtype,
            device=device,
            rank=collectives.rank,
            degree=degree,
        ),
    )
    cache = KVCache(
        args,
        num_blocks=num_blocks,
        block_size=config.block_size,
        n_kv_heads=n_kv_heads,
        dtype=cache_dtype(config, dtype),
        device=device,
    )
    if collectives.rank == 0:
        logger.info(
            "TP=%d on %s, %s, max_seq_len=%d, max_batch_size=%d, KV cache of %d blocks of %d tokens in %s",
            degree, device.type, dtype, config.max_seq_len, config.max_batch_size, num_blocks, config.block_size,
            cache_dtype(config, dtype),
        )  # fmt: skip
    engine = Engine(
        args=args,
        config=config,
        tokenizer=tokenizer,
        group=Lockstep(Runner(model, cache, device, config, adapters), collectives),
        num_blocks=num_blocks,
        # On a CPU a step is computed when the call returns.
        looks_ahead=device.type != "cpu",
    )
    if engine.rank == 0 and device.type != "cpu":
        warm_up(args.vocab_size, config.max_batch_size, device)
    return engine
