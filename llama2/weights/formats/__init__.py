"""Owns what a format of weights is: the tensors that a weight is made of, and the values that they stand for.

Knows no device and no file. A format is a file here, which describes it, and for each device that shall be fast a
product of that device's own. Until then the device dequantizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Part(NamedTuple):
    """One of the tensors that a weight is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Protocol):
    """How the values of a weight are stored."""

    @property
    def unit(self) -> int:
        """Neighbouring inputs that no cut may separate, such as a group with one scale. 1: any cut will do."""

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        """The parts of a weight with axes of these sizes, by name.

        A part has the axes of the weight, outputs first, in their order. Of the inputs the last axis may have another
        size, as many as the part has codes or scales there, or the part has none of them. So groups run along the last
        axis, and every element of the others begins a new one: where a head is narrower than a group, its scale is
        repeated.

        Raises:
            ValueError: the format cannot hold a weight of these sizes.
        """

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The values (F, C) of parts that have all outputs in their first axis, all inputs in their second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A rank's share of a weight: parts (F, ...) for its F outputs, as `Format.dequantize` takes them."""

    format: Format
    parts: Mapping[str, torch.Tensor]

    def dequantize(self) -> torch.Tensor:
        """The values (F, C), or (F,) of a vector."""
        return self.format.dequantize(self.parts)

    def rows(self, index_T: torch.Tensor) -> torch.Tensor:
        """The values (T, C) of some outputs."""
        return self.format.dequantize({name: part.index_select(0, index_T) for name, part in self.parts.items()})
