"""Owns the optimizers and the schedule of the learning rate. Knows no model: of what is trained it has one tensor."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch

from llama2.errors import InvalidValue
from llama2.training.config import TrainingConfig

BETAS = (0.9, 0.999)


def check_optimizer(config: TrainingConfig, device: torch.device) -> None:
    """
    Raises:
        InvalidValue: bitsandbytes' is asked for where it cannot run.
    """
    if config.optimizer == "adamw":
        return
    if device.type != "cuda":
        raise InvalidValue("optimizer", f"{config.optimizer} is for GPUs: choose adamw")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InvalidValue("optimizer", f"{config.optimizer} needs a package: pip install bitsandbytes")


def make_optimizer(config: TrainingConfig, parameters: torch.Tensor) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) over `parameters`, whose `grad` is set."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": BETAS, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW([parameters], fused=True, **settings)
    from bitsandbytes.optim import PagedAdamW8bit

    optimizer: torch.optim.Optimizer = PagedAdamW8bit([parameters], **settings)
    return optimizer


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Of step 1 to `num_steps`: up from 0 through `warmup`, then along the schedule, which would be 0 a step later."""
    warmup = math.ceil(config.warmup * num_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, num_steps - warmup)
    if config.schedule == "linear":
        return config.learning_rate * (1 - done)
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate
