"""Small models and samples to train with, and one step's losses and gradients, on any rank."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from llama2.adapters.adapter import LoraPair
from llama2.adapters.format import targets
from llama2.config import ModelArgs
from llama2.parallel.plan import build_mesh
from llama2.parallel.process_group import init_process_group
from llama2.training.config import TrainingConfig
from llama2.training.data import Sample
from llama2.training.lora import TrainedAdapter
from llama2.training.passes import Passes
from llama2.training.run import load
from llama2.weights.readers.dcp import DcpFolder

CPU = torch.device("cpu")


def options(**changes: Any) -> TrainingConfig:
    values = {"checkpoint_dir": "none", "data": "none.jsonl", "output_dir": "none", "max_length": 64}
    return TrainingConfig.of({**values, **changes})


def open_passes(
    folder: Path | str, config: TrainingConfig, dtype: torch.dtype = torch.float32
) -> tuple[Passes, TrainedAdapter]:
    """On every rank of the process group."""
    init_process_group(CPU)
    checkpoint = DcpFolder(folder)
    wanted = targets(config.adapter_config(), checkpoint.spec.args)
    mesh = build_mesh(checkpoint.spec, "cpu")
    passes, adapter, _ = load(checkpoint, wanted, config, mesh=mesh, dtype=dtype, device=CPU)
    return passes, adapter


def random_samples(lengths: list[int], vocab_size: int, *, seed: int = 0) -> list[Sample]:
    """About half of whose tokens count, and always the last one."""
    drawn = random.Random(seed)
    return [
        Sample(
            ids=tuple(drawn.randrange(3, vocab_size) for _ in range(length)),
            counts=(False, *(drawn.random() < 0.5 for _ in range(length - 2)), True),
        )
        for length in lengths
    ]


def random_pairs(config: TrainingConfig, args: ModelArgs, *, seed: int = 1) -> dict[str, LoraPair]:
    """An adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for weight, (rank, scaling) in targets(config.adapter_config(), args).items():
        axes, sizes = args.weight_axes()[weight], args.axis_sizes
        inputs, outputs = (
            int(torch.tensor([sizes[axis] for axis in own]).prod()) for own in (axes.inputs, axes.outputs)
        )
        a_RC = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        b_FR = torch.randn(outputs, rank, generator=generator) * 0.1
        found[weight] = LoraPair(a_RC=a_RC, b_FR=b_FR, scaling=scaling)
    return found


def one_step(
    folder: Path | str,
    config: TrainingConfig,
    samples: list[Sample],
    dtype: torch.dtype = torch.float32,
    dropout_seed: int | None = None,
) -> tuple[torch.Tensor, dict[str, LoraPair] | None, float]:
    """The losses of samples in one batch, and on rank 0 the gradients of their mean; and these gradients' norm."""
    passes, adapter = open_passes(folder, config, dtype)
    adapter.put(random_pairs(config, DcpFolder(folder).spec.args))
    losses = passes.losses(samples, dropout_seed=dropout_seed)
    losses.mean().backward()
    adapter.sum_gradients()
    return losses.detach(), adapter.pairs(gradients=True), adapter.gradient_norm()


def write_samples(path: Path, count: int = 60) -> Path:
    """Questions whose answers follow from them."""
    with path.open("w", encoding="utf-8") as file:
        for index in range(count):
            answer = "abcdef"[index % 6] * 3
            file.write(json.dumps({"prompt": f"What is {index % 6}?", "completion": f" It is {answer}."}) + "\n")
    return path
