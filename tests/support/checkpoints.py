"""Converted checkpoints without the converter, so that a test of the model fails for the model's faults alone."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from llama2.config import ModelArgs


def write_checkpoint(folder: Path, args: ModelArgs, weights: dict[str, torch.Tensor], *tokenizer_files: Path) -> Path:
    """Save Meta-shaped `weights` in their at-rest shapes, with `model_args.json` and the tokenizer beside them."""
    state = {name: weights[name].reshape(shape) for name, shape in args.parameter_shapes().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns that one process saves alone: intended
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    args.save(folder)
    for file in tokenizer_files:
        shutil.copy(file, folder)
    return folder
