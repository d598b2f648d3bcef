"""Owns AWQ's weights as AutoAWQ stores them for its product called GEMM (arXiv:2306.00978).

`qweight` int32 (C, F / 8) and `qzeros` (G, F / 8) hold eight outputs in a word, in an order of their own, `scales` are
(G, F).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama2.weights.formats.q4 import Q4
from llama2.weights.readers.hf_config import CONFIG_FILE
from llama2.weights.readers.quantized import SCALE_DTYPES, one_of
from llama2.weights.readers.quantized.integers import GROUP_SIZES, IntegerWeight, scale_dtype, unpack_bits
from llama2.weights.readers.tensor_files import TensorFiles

# Where in a word each of eight outputs is: from the lowest bits up they are 0, 2, 4, 6, 1, 3, 5, 7.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """See `Method`."""

    group_size: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Awq:
        """Raises ValueError if it describes what is not read."""
        one_of(config, "bits", (4,))
        one_of({**config, "version": str(config.get("version", "gemm")).lower()}, "version", ("gemm",))
        return cls(group_size=one_of(config, "group_size", GROUP_SIZES))

    def open(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> IntegerWeight | None:
        names = tuple(f"{name}.{part}" for part in ("qweight", "qzeros", "scales"))
        if names[0] not in files:
            return None
        outputs, inputs = shape
        if outputs % 8:
            raise ValueError(f"{files.path}: {name} of shape {shape} does not fill words of 32 bits in 4 bits")
        group = inputs if self.group_size == -1 else self.group_size
        shapes = (inputs, outputs // 8), (-(-inputs // group), outputs // 8), (-(-inputs // group), outputs)
        dtypes = (torch.int32,), (torch.int32,), SCALE_DTYPES
        codes, zeros, scales = (
            files.take(each, shape, allowed, by=CONFIG_FILE)
            for each, shape, allowed in zip(names, shapes, dtypes, strict=True)
        )
        return IntegerWeight(
            what=f"{files.file_of(names[0])}: {name}",
            method="AWQ",
            format=Q4(group=None if self.group_size == -1 else self.group_size, scales=scale_dtype(scales)),
            names=names,
            nbytes=sum(files[each].nbytes for each in names),
            scales_GF=scales,
            groups_C=torch.arange(inputs) // group,
            read_codes=lambda: _by_output(codes).T,
            read_zeros=lambda: _by_output(zeros),
        )


def _by_output(words: torch.Tensor) -> torch.Tensor:
    """Integers (..., F), uint8, from words (..., F / 8)."""
    fields = unpack_bits(words.contiguous().view(torch.uint8), 4)
    return fields.unflatten(-1, (-1, 8))[..., list(_PLACES)].flatten(-2)
