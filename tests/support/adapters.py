"""Adapters of random values, and whole forward passes with adapters, on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama2.adapters.adapter import Adapter, LoraPair
from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import targets, write_adapter
from llama2.adapters.products import BatchAdapters
from llama2.adapters.slots import AdapterSlots
from llama2.config import ModelArgs
from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import KVCache
from llama2.parallel.collectives import ProcessGroupCollectives, SingleRank
from llama2.parallel.plan import build_mesh, local_size
from llama2.parallel.process_group import init_process_group
from llama2.weights.loader import build_model
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.hf_layout import hf_shapes
from tests.support.batches import BLOCK_SIZE, NUM_BLOCKS, ragged_batch

CPU = torch.device("cpu")


def random_pairs(config: AdapterConfig, args: ModelArgs, *, seed: int = 0, size: float = 1.0) -> dict[str, LoraPair]:
    """What an adapter of that config may be after some training: neither of its matrices is zero. `size` is a factor of
    what it adds."""
    generator, shapes = torch.Generator().manual_seed(seed), hf_shapes(args)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    return {
        weight: LoraPair(
            a_RC=draw(target.rank, shapes[weight][1]),
            b_FR=size * draw(shapes[weight][0], target.rank),
            scaling=target.scaling,
        )
        for weight, target in targets(config, args).items()
    }


def write_random_adapter(folder: Path, args: ModelArgs, seed: int = 0, *, size: float = 1.0, **config: Any) -> Path:
    """`config` are fields of AdapterConfig."""
    settings = AdapterConfig(**{"r": 4, "lora_alpha": 8, **config})
    write_adapter(folder, random_pairs(settings, args, seed=seed, size=size), settings, args)
    return folder


def merged(weights: Mapping[str, torch.Tensor], pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    """Meta-shaped weights, with what an adapter adds to them."""
    return {
        name: value + pairs[weight].delta().to(value) if (weight := name.removesuffix(".weight")) in pairs else value
        for name, value in weights.items()
    }


def adapted_logits(
    folder: Path | str,
    prompts: Sequence[tuple[Sequence[int], Adapter | None]],
    *,
    max_rank: int = 16,
    before: Sequence[Adapter] = (),
) -> torch.Tensor | None:
    """The logits of all prompts, one after the other, in one pass of a converted folder's model in fp32.

    On every rank of the process group, if there is one; None on ranks other than 0. `before` are adapters that were in
    the first slots before.
    """
    init_process_group(CPU)
    checkpoint = DcpFolder(folder)
    spec = replace(checkpoint.spec, dtype=torch.float32)
    mesh = build_mesh(spec, "cpu")
    model = build_model(
        spec,
        mesh,
        ProcessGroupCollectives(None) if dist.get_world_size() > 1 else SingleRank(),
        device=CPU,
        max_seq_len=128,
        threads=1,
        fill=checkpoint.load,
        kernels=PlainKernels(),
    )
    cache = KVCache(
        spec.args,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        n_kv_heads=local_size("kv_heads", spec.args.n_kv_heads, mesh),
        dtype=torch.float32,
        device=CPU,
    )
    adapters = [adapter for _, adapter in prompts if adapter is not None]
    slots = AdapterSlots(
        spec.args,
        mesh,
        spec.units(),
        num_slots=len(adapters),
        max_rank=max_rank,
        dtype=torch.float32,
        device=CPU,
    )
    for slot, adapter in (*enumerate(before), *enumerate(adapters)):
        slots.put(slot, slots.take(adapter))
    free = iter(range(len(adapters)))
    slots_T = [slot for ids, adapter in prompts for slot in [next(free) if adapter else -1] * len(ids)]
    batch = replace(
        ragged_batch([(len(ids), len(ids)) for ids, _ in prompts], cache),
        adapters=BatchAdapters(slots_T=torch.tensor(slots_T, dtype=torch.int32), layers=slots.layers),
    )
    ids_T = torch.tensor([token for ids, _ in prompts for token in ids])
    with torch.no_grad():
        return model(ids_T, batch, torch.arange(len(ids_T)))
