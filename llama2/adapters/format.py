"""Owns an adapter's folder: PEFT's `adapter_config.json` and `adapter_model.safetensors`, and `base.json` beside them.

Knows no slot and no name of an adapter. Outputs of queries and keys are in transformers' order in the file, and in
Meta's here. PEFT ignores `base.json`, and writes none.

Shape suffixes: L layers, R adapter rank, C inputs, F outputs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llama2.adapters.adapter import Adapter, LoraPair, is_finite, layers_by_shape
from llama2.adapters.config import CONFIG_FILE, AdapterConfig
from llama2.adapters.products import PRODUCTS
from llama2.adapters.reference import WEIGHTS_FILE
from llama2.config import ModelArgs
from llama2.text.tokenizer_files import read_small_json
from llama2.weights.origin import is_quantized
from llama2.weights.readers.hf_layout import halves_from_pairs, hf_name, hf_shapes, is_rotated, pairs_from_halves
from llama2.weights.readers.tensor_files import open_tensors
from llama2.weights.staging import StagedFolder

BASE_FILE = "base.json"

_PREFIX = "base_model.model."
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What a part of a tensor's name says of an adapter that is not two matrices beside a linear layer.
_REFUSED = {
    "lora_magnitude_vector": "DoRA is not supported: train with use_dora=false",
    "lora_embedding": "trained embeddings are not supported: train the linear layers alone",
    "embed_tokens": "trained embeddings are not supported: train the linear layers alone",
    "token_adapter": "trained embeddings are not supported: train the linear layers alone",
    "lm_head": "a trained head is not supported: train the linear layers alone",
    "bias": "trained biases are not supported: train with bias=none and lora_bias=false",
    "modules_to_save": "modules that are trained whole are not supported: train with modules_to_save=null",
}


class Target(NamedTuple):
    """What an adapter has for a weight."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """What an adapter was trained on: the hash of the converted folder's weights (`certificate.Identity`), and how many
    of its values are stored in which precision (`Spec.stored`).
    """

    weights: str
    stored: Mapping[str, int]


def targets(config: AdapterConfig, args: ModelArgs) -> dict[str, Target]:
    """The weights that an adapter changes, by Meta's names, such as `layers.0.attention.wq`.

    Raises:
        ValueError: there are none, or the embedding or the head is among them.
    """
    for weight in ("tok_embeddings", "output"):
        if config.matches(module := hf_name(weight), linear=False):
            raise ValueError(f"target_modules match {module}: only linear layers of the layers can have an adapter")
    found = {}
    for weight in _linear_weights(args):
        module = hf_name(weight)
        if config.matches(module):
            found[weight] = Target(config.rank(module), config.scaling(module))
    if not found:
        raise ValueError(
            f"no module of the model is matched by target_modules={config.target_modules!r}: they are named such as "
            f"{hf_name('layers.0.attention.wq')}"
        )
    return found


def read_adapter(folder: Path | str, args: ModelArgs) -> Adapter:
    """Read an adapter for a model. Nothing in the folder is run, and nothing of it is needed afterwards.

    Its identity is the SHA-256 of all that is computed with: the weights' names, their scalings, and the dtypes, shapes
    and bytes of their matrices, those of the layers together that have one shape.

    Raises:
        ValueError: a file is missing or damaged, or the adapter is of another kind or for another model.
    """
    folder = Path(folder)
    config = AdapterConfig.load(folder)
    try:
        wanted = targets(config, args)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from None
    path = folder / WEIGHTS_FILE
    tensors = open_tensors(path)
    names = {name for weight in wanted for name in _names(weight)}
    for name in sorted(tensors.keys() - names):
        raise ValueError(f"{path}: {_unexpected(name)}")
    shapes = hf_shapes(args)
    pairs: dict[str, LoraPair] = {}
    hashing = hashlib.sha256()
    ranks = {weight: target.rank for weight, target in wanted.items()}
    for (kind, rank), layers in layers_by_shape(ranks).items():
        weights = [f"layers.{layer}.{kind}" for layer in layers]
        outputs, inputs = shapes[weights[0]]
        names_a, names_b = zip(*map(_names, weights), strict=True)
        a_LRC = _take(tensors, names_a, (rank, inputs), path)
        b_LFR = _take(tensors, names_b, (outputs, rank), path)
        if is_rotated(kind):
            b_LFR = pairs_from_halves(b_LFR.flatten(0, 1), args.head_dim).view_as(b_LFR)
        scalings = [wanted[weight].scaling for weight in weights]
        for values in (a_LRC, b_LFR):
            described = (weights, [scaling.hex() for scaling in scalings], str(values.dtype), tuple(values.shape))
            hashing.update(repr(described).encode())
            hashing.update(values.view(torch.uint8).numpy().data)
        for weight, a_RC, b_FR, scaling in zip(weights, a_LRC, b_LFR, scalings, strict=True):
            pairs[weight] = LoraPair(a_RC=a_RC, b_FR=b_FR, scaling=scaling)
    return Adapter(identity=hashing.digest(), pairs=pairs)


def write_adapter(
    folder: Path | str,
    pairs: Mapping[str, LoraPair],
    config: AdapterConfig,
    args: ModelArgs,
    *,
    base: Base | None = None,
) -> None:
    """Write an adapter as PEFT reads it. The folder appears when it is complete, and then replaces one of that name.

    Args:
        pairs: those that `targets` lists, by Meta's names.
        base: the converted folder that it was trained on, which `check_fits` compares.

    Raises:
        ValueError: the pairs are not what the config says, or the disk is full: the folder is as it was.
        OSError: it cannot be written: the folder is as it was.
    """
    tensors = {}
    shapes = hf_shapes(args)
    wanted = targets(config, args)
    if pairs.keys() != wanted.keys():
        raise ValueError(f"the config and the pairs differ in {sorted(pairs.keys() ^ wanted.keys())[0]}")
    for weight, pair in pairs.items():
        (outputs, inputs), target = shapes[weight], wanted[weight]
        if (pair.a_RC.shape, pair.b_FR.shape) != ((target.rank, inputs), (outputs, target.rank)):
            raise ValueError(f"{weight} must have matrices of {(target.rank, inputs)} and {(outputs, target.rank)}")
        if pair.scaling != target.scaling:
            raise ValueError(f"{weight} is scaled by {pair.scaling}, and by {target.scaling} in the config")
        b_FR = halves_from_pairs(pair.b_FR, args.head_dim) if is_rotated(weight) else pair.b_FR
        for name, values in zip(_names(weight), (pair.a_RC, b_FR), strict=True):
            tensors[name] = values.detach().cpu().contiguous()
    from safetensors.torch import save

    data = save(tensors, metadata={"format": "pt"})
    staged = StagedFolder(folder)
    staged.recover()
    staged.open(size=len(data))
    try:
        (staged.partial / WEIGHTS_FILE).write_bytes(data)
        config.save(staged.partial)
        if base is not None:
            (staged.partial / BASE_FILE).write_text(json.dumps(asdict(base), indent=2) + "\n", encoding="utf-8")
        staged.commit()
    except BaseException:
        staged.discard()
        raise


def read_base(folder: Path | str) -> Base | None:
    """What the adapter was trained on; None where the folder does not say, as PEFT's do not.

    Raises:
        ValueError: the file is damaged.
    """
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        return None
    values = read_small_json(path)
    weights, stored = values.get("weights"), values.get("stored")
    if not isinstance(weights, str) or not isinstance(stored, dict) or len(values) != 2:
        raise ValueError(f"{path} must have the hash of a base's 'weights', and its numbers of values 'stored'")
    return Base(weights=weights, stored=stored)


def check_fits(folder: Path | str, adapter: Adapter, own: Base | None, *, is_sorted: bool) -> bool:
    """Compare what an adapter was trained on with the weights that it shall be added to.

    Args:
        own: these weights; None: their hash is not known.
        is_sorted: they have hidden features in an order of their own (`origin.SORTED`).

    Returns:
        Whether it is known to be trained on them: not where `folder` does not say on what, nor where weights that are
        quantized and others that are not would be compared.

    Raises:
        ValueError: it was trained on others, or may have hidden features in another order.
    """
    base, is_own = read_base(folder), False
    if base is not None and own is not None and is_quantized(base.stored) == is_quantized(own.stored):
        if base.weights != own.weights:
            raise ValueError(
                f"{folder} was trained on another base: on weights stored as {' and '.join(base.stored)} with the hash "
                f"{base.weights}, and these have {own.weights}; without its {BASE_FILE} it is taken for any base of "
                "its shapes"
            )
        is_own = True
    if is_sorted and adapter.changes_hidden and not is_own:
        raise ValueError(
            f"{folder} changes gate_proj, up_proj or down_proj, whose hidden features these weights have in another "
            "order than the files that they were made of: merge it into those files, or train one on this folder"
        )
    return is_own


def _linear_weights(args: ModelArgs) -> Iterator[str]:
    for layer in range(args.n_layers):
        for weights in PRODUCTS.values():
            yield from (f"layers.{layer}.{weight}" for weight in weights)


def _names(weight: str) -> tuple[str, str]:
    """The tensors' names of A and of B."""
    module = f"{_PREFIX}{hf_name(weight)}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _unexpected(name: str) -> str:
    """Why a tensor is not one of an adapter with this config."""
    shown = repr(name[:100])
    for part, sentence in _REFUSED.items():
        if part in name:
            return f"tensor {shown}: {sentence}"
    if name.endswith((".lora_A.weight", ".lora_B.weight")):
        return f"tensor {shown} is of a module that the model has not, or that {CONFIG_FILE} does not match"
    return f"tensor {shown} is unknown: expected {_PREFIX}MODULE.lora_A.weight and lora_B.weight"


def _take(
    tensors: Mapping[str, torch.Tensor], names: Sequence[str], shape: tuple[int, ...], path: Path
) -> torch.Tensor:
    """Copies in memory, as one tensor (len(names), *shape)."""
    for name in names:
        if name not in tensors:
            raise ValueError(f"{path}: tensor {name!r} is missing, which {CONFIG_FILE} asks for")
        values = tensors[name]
        if tuple(values.shape) != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(values.shape)}, expected {shape} by {CONFIG_FILE} and the model"
            )
        if values.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is {values.dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    taken = torch.stack([tensors[name] for name in names])
    if not is_finite(taken):
        name = next(name for name, values in zip(names, taken, strict=True) if not is_finite(values))
        raise ValueError(f"{path}: {name} has values that are not finite (NaN or infinity)")
    return taken
