"""A format of two parts that no device knows: int8 codes, and a scale for each group of neighbouring inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Part


@dataclass(frozen=True, slots=True)
class Int8Groups:
    """See `llama2.weights.formats.Format`."""

    unit: int

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        *outer, last = inputs
        groups = -(-last // self.unit)
        if last % groups:
            raise ValueError(f"groups of {self.unit} do not fill an axis of {last}")
        return {
            "codes": Part((*outputs, *inputs), torch.int8),
            "scales": Part((*outputs, *outer, groups), torch.float32),
        }

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes, scales = parts["codes"], parts["scales"]
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales[..., None]).flatten(-2)
