"""Owns weights in 8 bits: a value is s · q, with a scale s for each group of neighbouring inputs, or one for all.

GGUF's Q8_0 and Q5_0 are exact in it with groups of 32, Q6_K with fp32 scales for groups of 16
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Part
from llama2.weights.formats.groups import count, divide, spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Q8:
    """See `llama2.weights.formats.Format`. `group` None: a scale is for all inputs of an output."""

    group: int | None = 32
    scales: torch.dtype = torch.float16

    @property
    def unit(self) -> int:
        return self.group or 1

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        per_group = (*inputs[:-1], count(inputs[-1], self.group)) if self.group else ()
        return {
            "codes": Part((*outputs, *inputs), torch.int8),
            "scales": Part((*outputs, *per_group), self.scales),
        }

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return parts["codes"] * spread(parts["scales"], parts["codes"].shape[1])

    def quantize(self, values_FC: torch.Tensor) -> dict[str, torch.Tensor]:
        groups_FGI = values_FC.float().unflatten(1, (-1, self.group or values_FC.shape[1]))
        scales_FG = (groups_FGI.abs().amax(-1) / 127).to(self.scales)
        codes = divide(groups_FGI, scales_FG).round().clamp(-127, 127)
        return {
            "codes": codes.flatten(1).to(torch.int8),
            "scales": scales_FG if self.group else scales_FG[:, 0],
        }
