"""Random weights of any architecture, in Meta's two-dimensional shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from llama2.config import ModelArgs
from llama2.weights.precision import Converted, target
from llama2.weights.readers import Reader


def tiny_args(**changes: object) -> ModelArgs:
    """A model small enough to run a thousand times: 2 layers, 8 query heads on 4 KV heads of 8, vocabulary 96."""
    params: dict[str, object] = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 8,
        "n_kv_heads": 4,
        "vocab_size": 96,
        "multiple_of": 16,
    }
    return ModelArgs.from_params({**params, **changes})


def meta_shape(name: str, args: ModelArgs) -> tuple[int, ...]:
    """The shape that Meta's files give to parameter `name`: heads and head_dim flattened into one axis."""
    shape = args.parameter_shapes()[name]
    if name.endswith("attention.wo.weight"):
        return (shape[0], math.prod(shape[1:]))
    if name.endswith(("attention.wq.weight", "attention.wk.weight", "attention.wv.weight")):
        return (math.prod(shape[:-1]), shape[-1])
    return shape


def meta_weights(reader: Reader) -> dict[str, torch.Tensor]:
    """The values of all weights of a source, in Meta's two-dimensional shapes; in fp32 where they are quantized."""
    if reader.spec.formats:
        reader = Converted(reader, target(reader.spec, dtype=torch.float32, quantize="none"))
    names = reader.spec.args.parameter_shapes()
    return {name: reader.read(name).reshape(meta_shape(name, reader.spec.args)) for name in names}


def random_weights(args: ModelArgs, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A full set of weights, scaled so that activations stay near 1 through the layers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in args.parameter_shapes():
        shape = meta_shape(name, args)
        values = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * values if len(shape) == 1 else values / math.sqrt(shape[-1])).to(dtype)
    return weights


def meta_shards(weights: dict[str, torch.Tensor], num_shards: int) -> list[dict[str, torch.Tensor]]:
    """Cut Meta-shaped weights as Llama 2's Fairscale does: rows, columns of wo, w2 and the embedding, norms whole."""

    def parts(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, ...] | list[torch.Tensor]:
        if name.endswith("norm.weight"):
            return [weight] * num_shards
        columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        return weight.chunk(num_shards, dim=1 if columns else 0)

    cut = {name: parts(name, weight) for name, weight in weights.items()}
    return [{name: cut[name][index].contiguous() for name in weights} for index in range(num_shards)]


def meta_folder(folder: Path, args: ModelArgs, weights: dict[str, torch.Tensor], *, num_shards: int) -> Path:
    """Write Meta's folder, without a tokenizer, by plain torch.save: what the project's own reader is tested on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(args.to_params()))
    for index, shard in enumerate(meta_shards(weights, num_shards)):
        # Meta's files carry this buffer, which is no weight.
        torch.save({**shard, "rope.freqs": torch.zeros(args.head_dim // 2)}, folder / f"consolidated.{index:02d}.pth")
    return folder
