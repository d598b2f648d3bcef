"""PEFT's models: the outside reference of what adapters compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llama2.config import ModelArgs
from tests.support.reference import reference_model


def peft_model(args: ModelArgs, weights: dict[str, torch.Tensor], *, seed: int = 1, **options: Any) -> PeftModel:
    """PEFT's model with an adapter that changes what is computed: neither of its matrices is zero."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(reference_model(args, weights), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    return model


def peft_logits(model: torch.nn.Module, ids: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([list(ids)])).logits[0]
