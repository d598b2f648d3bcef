"""Owns weights in 4 bits: a value is s · (q - z), with a scale s and a zero z for each group of neighbouring inputs.

GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and GGUF's Q4_0 are exact in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Part
from llama2.weights.formats.groups import count, divide, pack, spread, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Q4:
    """See `llama2.weights.formats.Format`. `group` None: one for all inputs. `zero` None: each group has its own z."""

    group: int | None = 128
    zero: int | None = None
    scales: torch.dtype = torch.float16

    @property
    def unit(self) -> int:
        return self.group or 2

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        *outer, last = inputs
        per_group = (*outer, count(last, self.group)) if self.group else ()
        parts = {
            "codes": Part((*outputs, *outer, count(last, 2)), torch.uint8),
            "scales": Part((*outputs, *per_group), self.scales),
        }
        return parts if self.zero is not None else parts | {"zeros": Part((*outputs, *per_group), torch.uint8)}

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = unpack(parts["codes"])
        zeros = spread(parts["zeros"], codes.shape[1]) if self.zero is None else self.zero
        return (codes.float() - zeros) * spread(parts["scales"], codes.shape[1])

    def quantize(self, values_FC: torch.Tensor) -> dict[str, torch.Tensor]:
        """The range of a group, 0 in it, is divided evenly. Only with a zero of each group's own."""
        assert self.zero is None
        groups_FGI = values_FC.float().unflatten(1, (-1, self.group or values_FC.shape[1]))
        lowest_FG, highest_FG = groups_FGI.amin(-1).clamp(max=0), groups_FGI.amax(-1).clamp(min=0)
        scales_FG = ((highest_FG - lowest_FG) / 15).to(self.scales)
        zeros_FG = divide(-lowest_FG[..., None], scales_FG)[..., 0].round().clamp(0, 15)
        codes = (divide(groups_FGI, scales_FG).round() + zeros_FG[..., None]).clamp(0, 15)
        parts = {"codes": pack(codes.flatten(1)), "scales": scales_FG, "zeros": zeros_FG.to(torch.uint8)}
        return parts if self.group else parts | {name: parts[name][:, 0] for name in ("scales", "zeros")}
