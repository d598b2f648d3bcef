"""Owns what the arguments of the constructors mean, of `LLM` and of `AsyncLLM`: a folder and options, to an engine.

Knows no prompt: what the arguments of a call mean is said in `arguments.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from llama2.arguments import ArgumentReader
from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.errors import InvalidValue
from llama2.names import first_names


def open_model(
    checkpoint_dir: Path | str | None,
    *,
    model: Path | str | None,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    tokenizer_path: Path | str | None,
    **options: Any,
) -> tuple[Engine, ArgumentReader]:
    """The engine, and what makes requests for it. `model` is a second name of `checkpoint_dir`, `options` are the
    fields of `EngineConfig`; see `load_engine` for the rest.

    Raises:
        ValueError: the checkpoint, the tokenizer, the TP degree or an option is wrong.
    """
    if checkpoint_dir is not None and model is not None:
        raise InvalidValue("model", "is a second name of checkpoint_dir: give one of them")
    config = _engine_config(options)  # before the folder, whose name may be what is misspelt
    folder = model if checkpoint_dir is None else checkpoint_dir
    if folder is None:
        raise InvalidValue("checkpoint_dir", "is missing: it is the folder that convert_checkpoints.py wrote")
    engine = load_engine(folder, tokenizer_path=tokenizer_path, dtype=dtype, device=device, config=config)
    return engine, ArgumentReader(engine.tokenizer, engine.limits)


def _engine_config(options: Mapping[str, Any]) -> EngineConfig:
    if "tensor_parallel_size" in options:
        raise InvalidValue(
            "tensor_parallel_size", "is no option here: start the script under torchrun --nproc_per_node N"
        )
    of_requests = {field.name for field in fields(SamplingParams)} - {field.name for field in fields(EngineConfig)}
    for name in options:
        if name in of_requests:
            raise InvalidValue(name, f"is no option of an LLM but of a call: generate(…, {name}=…)")
    others = ("checkpoint_dir", "model", "dtype", "device", "tokenizer_path")
    return EngineConfig(**first_names(options, EngineConfig, *others))
