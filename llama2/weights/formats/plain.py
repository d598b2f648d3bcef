"""Owns the format of weights that are their values: bf16, fp16 and fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Part


@dataclass(frozen=True, slots=True)
class Plain:
    """See `llama2.weights.formats.Format`."""

    dtype: torch.dtype
    unit = 1

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        return {"weight": Part((*outputs, *inputs), self.dtype)}

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["weight"]
