"""Owns weights in 4 bits with a scale and a minimum for each group: a value is s · q + m.

GGUF's Q4_1 is exact in it; with two levels, where s and m are products of small integers and of what many groups share,
Q4_K and Q2_K are (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Part
from llama2.weights.formats.groups import count, spread, unpack


@dataclass(frozen=True, slots=True, kw_only=True)
class Q4K:
    """See `llama2.weights.formats.Format`. `super_group` are the inputs that share the second level, if there is one.

    One level: fp16 `scales` and `mins`. Two: both are uint8, to be multiplied by fp16 `super_scales` and `super_mins`.
    """

    group: int = 32
    super_group: int | None = None

    @property
    def unit(self) -> int:
        return self.group

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        *outer, last = inputs
        groups = (*outputs, *outer, count(last, self.group))
        parts = {"codes": Part((*outputs, *outer, count(last, 2)), torch.uint8)}
        level = torch.float16 if self.super_group is None else torch.uint8
        parts |= {name: Part(groups, level) for name in ("scales", "mins")}
        if self.super_group is not None:
            supers = (*outputs, *outer, count(last, self.super_group))
            parts |= {f"super_{name}": Part(supers, torch.float16) for name in ("scales", "mins")}
        return parts

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = unpack(parts["codes"])

        def level(name: str) -> torch.Tensor:
            first = parts[name].float()
            if self.super_group is not None:
                first = first * spread(parts[f"super_{name}"], first.shape[1])
            return spread(first, codes.shape[1])

        return codes * level("scales") + level("mins")
