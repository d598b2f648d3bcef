"""Owns weights stored as integers with a scale and a zero for each group of inputs, s · (q - z): GPTQ's and AWQ's.

Knows no file and no config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llama2.weights.formats.groups import pack
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8

# 16 to the largest that is in use; -1: one group.
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWeight:
    """See `StoredWeight`.

    Attributes:
        what: names it in errors.
        method: that it was quantized by.
        groups_C: the group of each input.
        read_codes: reads q (F, C), uint8.
        read_zeros: reads z (G, F), uint8.
        columns_C: the inputs in another order than the codes have; None: in theirs.
    """

    what: str
    method: str
    format: Q4 | Q8
    names: tuple[str, ...]
    nbytes: int
    scales_GF: torch.Tensor
    groups_C: torch.Tensor
    read_codes: Callable[[], torch.Tensor]
    read_zeros: Callable[[], torch.Tensor]
    columns_C: torch.Tensor | None = None

    @property
    def kind(self) -> str:
        return self.method if self.order_C is None else f"{self.method} with desc_act"

    @property
    def parts(self) -> tuple[str, ...]:
        own_zeros = isinstance(self.format, Q4) and self.format.zero is None
        return ("codes", "scales", "zeros") if own_zeros else ("codes", "scales")

    @property
    def order_C(self) -> torch.Tensor | None:
        """The inputs group by group; None: they are in this order."""
        if (self.groups_C.diff() >= 0).all():
            return None
        return self.groups_C.argsort(stable=True)

    def ordered(self, order_C: torch.Tensor) -> IntegerWeight:
        """The same weight of inputs that come in another order."""
        return replace(self, groups_C=self.groups_C[order_C], columns_C=order_C)

    def holds(self, group: int | None) -> bool:
        by_group = self.groups_C.view(-1, group or len(self.groups_C))
        return bool((by_group == by_group[:, :1]).all())

    def read(self, part: str, step: int) -> torch.Tensor:
        if part == "codes":
            return self._codes()
        per_group_GF = self.read_zeros() if part == "zeros" else self._scales()
        return per_group_GF[self.groups_C[::step]].T.contiguous()

    def _scales(self) -> torch.Tensor:
        if not self.scales_GF.isfinite().all():
            raise ValueError(f"{self.what}: scales must be finite numbers")
        return self.scales_GF.to(self.format.scales)

    def _codes(self) -> torch.Tensor:
        codes = self.read_codes()
        if self.columns_C is not None:
            codes = codes[:, self.columns_C]
        if isinstance(self.format, Q4):
            if self.format.zero is not None and (self.read_zeros() != self.format.zero).any():
                raise ValueError(f"{self.what}: quantization_config says sym, but a zero is not {self.format.zero}")
            return pack(codes)
        differences = codes.to(torch.int16) - self.read_zeros().T[:, self.groups_C]
        signed = differences.to(torch.int8)
        if (signed != differences).any():
            raise ValueError(
                f"{self.what}: 8 bits cannot hold its codes less their zeros: quantize it with sym, or in 4"
            )
        return signed


def scale_dtype(scales: torch.Tensor) -> torch.dtype:
    """That of a format which holds the scales: bf16 is fp16 where no value needs its exponents, and otherwise fp32."""
    if scales.dtype != torch.bfloat16:
        return scales.dtype
    return torch.float16 if torch.equal(scales.half().bfloat16(), scales) else torch.float32


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers of `bits` (..., 8 / bits · N), the lowest bits first, from bytes (..., N) that they fill: uint8."""
    units = packed.unflatten(-1, (-1, bits))
    fields = []
    for start in range(0, 8 * bits, bits):
        byte, shift = divmod(start, 8)
        field = units[..., byte] >> shift
        if shift + bits > 8:
            field |= units[..., byte + 1] << (8 - shift)
        fields.append(field & ((1 << bits) - 1))
    return torch.stack(fields, dim=-1).flatten(-2)
