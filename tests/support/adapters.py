"""Adapters of random values, written as PEFT's folders are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama2.adapters.adapter import LoraPair
from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import targets, write_adapter
from llama2.config import ModelArgs
from tests.support.weights import meta_shape


def random_pairs(args: ModelArgs, config: AdapterConfig, seed: int = 0, *, size: float = 1.0) -> dict[str, LoraPair]:
    """In fp32; what they add is about `size` times as large as a weight."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for weight, (rank, scaling) in targets(config, args).items():
        outputs, inputs = meta_shape(f"{weight}.weight", args)
        pairs[weight] = LoraPair(
            a_RC=torch.randn(rank, inputs, generator=generator) * inputs**-0.5,
            b_FR=torch.randn(outputs, rank, generator=generator) * size / (scaling * rank**0.5),
            scaling=scaling,
        )
    return pairs


def write_random_adapter(folder: Path, args: ModelArgs, seed: int = 0, *, size: float = 1.0, **config: Any) -> Path:
    """`config` are fields of AdapterConfig."""
    settings = AdapterConfig(**{"r": 4, "lora_alpha": 8, **config})
    write_adapter(folder, random_pairs(args, settings, seed, size=size), settings, args)
    return folder


def merged(weights: Mapping[str, torch.Tensor], pairs: Mapping[str, LoraPair]) -> dict[str, torch.Tensor]:
    """Meta-shaped weights, with what an adapter adds to them."""
    return {
        name: value + pairs[weight].delta().to(value) if (weight := re.sub(r"\.weight$", "", name)) in pairs else value
        for name, value in weights.items()
    }
