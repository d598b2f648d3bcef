"""A small model in Meta's layout: what the converter is told about it, and what it must make of it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from llama2.config import ModelArgs
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import same_bits
from tests.support.weights import random_weights, tiny_args

ROOT = Path(__file__).parents[2]
ARGS = tiny_args(vocab_size=480, n_layers=1)
WEIGHTS = random_weights(ARGS, dtype=torch.bfloat16)


def flags(source: Path, target: Path) -> list[object]:
    return ["--original_ckpt_dir", source, "--save_checkpoint_dir", target]


def assert_holds(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """`folder` is a converted checkpoint of WEIGHTS, complete by itself."""
    assert ModelArgs.load(folder) == ARGS
    assert load_tokenizer(folder).vocab_size == 480
    state = {name: torch.empty(shape, dtype=dtype) for name, shape in ARGS.parameter_shapes().items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    stored = DcpFolder(folder)
    assert stored.spec.dtype == dtype
    for name, weight in WEIGHTS.items():
        assert same_bits(state[name].flatten(), weight.to(dtype).flatten()), name
        assert same_bits(stored.read(name), state[name]), name
