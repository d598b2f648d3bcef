"""Owns a change of precision: a source's weights in the formats of another spec, a block of rows at a time.

Knows no file. What has the same format in both is passed on as it is stored, unless an adapter is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch

from llama2.adapters.merge import Merge
from llama2.weights.formats import Format
from llama2.weights.formats.groups import repeated
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.formats.plain import Plain
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8
from llama2.weights.readers import Chunk, Reader, whole
from llama2.weights.spec import Spec, fitting

PRECISIONS: Mapping[str, Format] = MappingProxyType(
    {
        "int8": Q8(),
        "int4": Q4(),
        "nf4": Lut4(table="nf4"),
        "nf4_double": Lut4(table="nf4", scales=torch.uint8),
    }
)
# What gptqmodel is asked for.
_GPTQ = Q4(zero=8)
# Values that are quantized at once: as fp32, with a few intermediates, some hundred MB.
_BLOCK = 1 << 24


_HEAD = ("tok_embeddings", "output")


@runtime_checkable
class Quantizer(Protocol):
    """A format that values can be brought into."""

    def quantize(self, values_FC: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts (F, ...) nearest to values, in groups along C."""


def target(
    stored: Spec,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    quantize_head: bool = True,
    requantize: bool = False,
    merged: Collection[str] = (),
) -> Spec:
    """What becomes of weights that are `stored`.

    Args:
        dtype: of the plain values; None: as stored.
        quantize: "none", "int8", "int4", "nf4", "nf4_double" or "gptq"; None: the formats stored. Norms stay plain.
        quantize_head: int8 for the embedding and the head, too.
        requantize: allow it where weights are quantized otherwise, or `merged`.
        merged: the weights to which something is added. Of those `stored` these become plain.

    Raises:
        ValueError: `quantize` is no such name, would requantize, or the model's sizes leave no group.
    """
    spec = replace(stored, dtype=dtype or stored.dtype)
    if quantize is None:
        return replace(spec, formats={name: each for name, each in stored.formats.items() if name not in merged})
    if quantize == "none":
        formats: dict[str, Format] = {}
    elif quantize in (*PRECISIONS, "gptq"):
        formats = {
            name: fitting(PRECISIONS["int8"] if name in _HEAD else PRECISIONS.get(quantize, _GPTQ), name, spec.args)
            for name, axes in spec.args.weight_axes().items()
            if axes.inputs and (quantize_head or name not in _HEAD)
        }
    else:
        raise ValueError(f"--quantize must be none, {', '.join(PRECISIONS)} or gptq, got {quantize!r}")
    kept = stored.formats == formats and quantize != "gptq" and not merged
    if stored.formats and formats and not kept and not requantize:
        raise ValueError(
            "these weights are quantized already: without --quantize they keep their precision; --requantize allows "
            f"to make {quantize} of what is left of them"
        )
    return replace(spec, formats=formats)


class Converted:
    """A `Reader` of `source`'s weights in the formats of `spec`, with an adapter merged into them, if there is one.

    Its sums are made in fp32 and rounded once, to the format of `spec`.

    Raises:
        ValueError: a weight would have to be brought into a format that can only be read.
    """

    def __init__(self, source: Reader, spec: Spec, merge: Merge | None = None) -> None:
        self.path = source.path
        self.spec = spec
        self._source = source
        self._merge = merge
        self._tensors, self._stored = spec.tensors(), source.spec.tensors()
        # The parts of the weight that was asked for last: they are made together.
        self._latest: tuple[str, dict[str, torch.Tensor]] = ("", {})
        for name in spec.args.weight_axes():
            format = spec.format(name)
            if not self._passes(name) and not isinstance(format, (Plain, Quantizer)):
                raise ValueError(f"{name} cannot be brought into the format {format}: it can only be read")

    def read(self, name: str) -> torch.Tensor:
        """See `Reader`."""
        weight, _, part = name.rpartition(".")
        if self._passes(weight):
            return self._source.read(name).reshape(self._tensors[name].shape)
        if isinstance(self.spec.format(weight), Plain):
            return self._convert(weight)[part]
        if self._latest[0] != weight:
            self._latest = ("", {})
            self._latest = (weight, self._convert(weight))
        return self._latest[1][part]

    def chunks(self, name: str) -> list[Chunk]:
        """See `Reader`."""
        stored = self._stored.get(name)
        if stored is not None and self._passes(name.rpartition(".")[0]) and stored.shape == self._tensors[name].shape:
            return self._source.chunks(name)
        return whole(self, name, self._tensors[name].shape)

    def shares(self) -> list[list[Chunk]]:
        """All chunks; those of one list are best read by the same process, one after the other."""
        shares: list[list[Chunk]] = []
        latest = ""
        for name in self._tensors:
            weight = name.rpartition(".")[0]
            if self._passes(weight):
                shares += [[chunk] for chunk in self.chunks(name)]
            elif weight == latest:
                shares[-1] += self.chunks(name)
            else:
                shares.append(self.chunks(name))
            latest = weight
        return shares

    def _passes(self, weight: str) -> bool:
        """Whether the weight's tensors are passed on: those that are plain may change their dtype on the way."""
        ours, theirs = self.spec.format(weight), self._source.spec.format(weight)
        if self._merge is not None and weight in self._merge.pairs:
            return False
        return ours == theirs or (isinstance(ours, Plain) and isinstance(theirs, Plain))

    def _convert(self, weight: str) -> dict[str, torch.Tensor]:
        """All parts of a weight, at rest."""
        theirs, ours = self._source.spec.format(weight), self.spec.format(weight)
        stored = {
            part: _by_outputs(self._source.read(name), self._stored[name].num_outputs)
            for part, name in _parts_of(weight, self._stored).items()
        }
        outputs = len(next(iter(stored.values())))
        shape = self.spec.args.parameter_shapes()[f"{weight}.weight"]
        rows = max(1, _BLOCK * outputs // math.prod(shape))
        blocks = []
        for row in range(0, outputs, rows):
            values_FC = theirs.dequantize({part: values[row : row + rows] for part, values in stored.items()})
            if self._merge is not None and (pair := self._merge.pairs.get(weight)) is not None:
                if self._merge.quantize_first:
                    values_FC = ours.dequantize(_quantize(ours, values_FC))
                values_FC = values_FC.float() + replace(pair, b_FR=pair.b_FR[row : row + rows]).delta()
            blocks.append(_quantize(ours, values_FC))
        result = {}
        for part, name in _parts_of(weight, self._tensors).items():
            tensor = self._tensors[name]
            values = torch.cat([block[part] for block in blocks])
            result[part] = repeated(values, tensor.shape).view(tensor.shape)
        return result


def _quantize(format: Format, values_FC: torch.Tensor) -> Mapping[str, torch.Tensor]:
    if isinstance(format, Plain):
        return {"weight": values_FC.to(format.dtype)}
    assert isinstance(format, Quantizer)
    return format.quantize(values_FC)


def _by_outputs(part: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """A part at rest with all outputs in its first axis, all inputs in its second, if it has any."""
    by_output = part.flatten(0, num_outputs - 1)
    return by_output.flatten(1) if by_output.dim() > 1 else by_output


def _parts_of(weight: str, tensors: Mapping[str, object]) -> dict[str, str]:
    """The names of a weight's tensors, by the names of its parts."""
    return {name.rpartition(".")[2]: name for name in tensors if name.rpartition(".")[0] == weight}
