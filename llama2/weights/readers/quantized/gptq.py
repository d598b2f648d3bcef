"""Owns GPTQ's weights as AutoGPTQ and GPTQModel store them (arXiv:2210.17323).

`qweight` int32 (C · bits / 32, F) holds the codes of an output in bits that run along the inputs, the lowest first;
`qzeros` (G, F · bits / 32) the zeros, along the outputs. In the first version of the files a one was taken from each
field of a word, so that a zero of 0 borrows from the field after it. `scales` are (G, F). `g_idx` (C,) is the group of
each input, with `desc_act` in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8
from llama2.weights.readers.hf_config import CONFIG_FILE
from llama2.weights.readers.quantized import SCALE_DTYPES, one_of
from llama2.weights.readers.quantized.integers import GROUP_SIZES, IntegerWeight, scale_dtype, unpack_bits
from llama2.weights.readers.tensor_files import TensorFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """See `Method`. `less_one`: the files hold zeros less one."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    less_one: bool

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Gptq:
        """Raises ValueError if it describes what is not read."""
        one_of(config, "pack_dtype", ("int32",), "int32")
        one_of(config, "is_marlin_format", (False,), False)
        method = cls(
            bits=one_of(config, "bits", (2, 3, 4, 8)),
            group_size=one_of(config, "group_size", GROUP_SIZES),
            symmetric=one_of(config, "sym", (True, False), True),
            desc_act=one_of(config, "desc_act", (True, False), False),
            less_one=one_of(config, "checkpoint_format", ("gptq", "gptq_v2"), "gptq") == "gptq",
        )
        if method.bits == 3 and method.less_one and not method.symmetric:
            raise ValueError(
                "zeros of 3 bits are read from files of checkpoint_format gptq_v2 alone: programs differ in how they "
                "wrote them before"
            )
        return method

    def open(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> IntegerWeight | None:
        if f"{name}.qweight" not in files:
            return None
        outputs, inputs = shape
        if inputs * self.bits % 32 or outputs * self.bits % 32:
            raise ValueError(
                f"{files.path}: {name} of shape {shape} does not fill words of 32 bits in {self.bits} bits"
            )
        group = inputs if self.group_size == -1 else self.group_size
        groups = -(-inputs // group)

        def take(part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor:
            return files.take(f"{name}.{part}", shape, dtypes, by=CONFIG_FILE)

        codes = take("qweight", (inputs * self.bits // 32, outputs), torch.int32)
        zeros = take("qzeros", (groups, outputs * self.bits // 32), torch.int32)
        scales = take("scales", (groups, outputs), *SCALE_DTYPES)
        parts = ["qweight", "qzeros", "scales"]
        groups_C = torch.arange(inputs) // group
        if self.desc_act or f"{name}.g_idx" in files:
            parts.append("g_idx")
            groups_C = take("g_idx", (inputs,), torch.int32, torch.int64).long()
            if groups_C.min() < 0 or groups_C.max() >= groups:
                raise ValueError(f"{files.file_of(f'{name}.g_idx')}: {name}.g_idx must be from 0 to {groups - 1}")
        if f"{name}.bias" in files:
            # Some versions of AutoGPTQ wrote one for every weight.
            parts.append("bias")
            if take("bias", (outputs,), *SCALE_DTYPES).any():
                raise ValueError(f"{files.file_of(f'{name}.bias')}: tensor '{name}.bias' is not part of a Llama model")
        names = tuple(f"{name}.{part}" for part in parts)
        return IntegerWeight(
            what=f"{files.file_of(names[0])}: {name}",
            method="GPTQ",
            format=self._format(scale_dtype(scales)),
            names=names,
            nbytes=sum(files[each].nbytes for each in names),
            scales_GF=scales,
            groups_C=groups_C,
            read_codes=lambda: unpack_bits(codes.T.contiguous().view(torch.uint8), self.bits),
            read_zeros=lambda: self._zeros(zeros),
        )

    def _format(self, scales: torch.dtype) -> Q4 | Q8:
        group = None if self.group_size == -1 else self.group_size
        if self.bits == 8:
            return Q8(group=group, scales=scales)
        return Q4(group=group, zero=1 << (self.bits - 1) if self.symmetric else None, scales=scales)

    def _zeros(self, stored: torch.Tensor) -> torch.Tensor:
        """The zeros (G, F), uint8."""
        if self.less_one and self.bits == 3:
            # Fields of 3 bits end in the middle of words: there is no borrowing, from one to the next.
            return (unpack_bits(stored.contiguous().view(torch.uint8), 3) + 1) & 7
        if self.less_one:
            ones = sum(1 << start for start in range(0, 32, self.bits)).to_bytes(4, "little")
            stored = stored + torch.frombuffer(bytearray(ones), dtype=torch.int32)
        return unpack_bits(stored.contiguous().view(torch.uint8), self.bits)
