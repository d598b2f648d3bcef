"""Owns weights in NF4 and FP4 as bitsandbytes stores them (arXiv:2305.14314; `QuantState` of its functional.py).

`weight` uint8 (F · C / 2, 1) holds the codes of the flattened matrix, the first of two in the high half; each block of
them has a scale in `absmax`. With double quantization that is a code itself, of the table `nested_quant_map`, with a
scale for each block of scales in `nested_absmax`, and an offset. The rest is JSON in `quant_state`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.readers.hf_config import CONFIG_FILE
from llama2.weights.readers.quantized import one_of
from llama2.weights.readers.tensor_files import TensorFiles

_BLOCK_SIZES = tuple(1 << power for power in range(5, 13))
_LARGEST_STATE = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BitsAndBytes:
    """See `Method`. `table` is that of the codes."""

    table: str

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> BitsAndBytes:
        """Raises ValueError if it describes what is not read."""
        if config.get("load_in_8bit"):
            raise ValueError("weights in 8 bits (load_in_8bit, LLM.int8) are not read, only those in 4 (load_in_4bit)")
        one_of(config, "load_in_4bit", (True,))
        one_of(config, "bnb_4bit_quant_storage", ("uint8",), "uint8")
        return cls(table=one_of(config, "bnb_4bit_quant_type", ("nf4", "fp4"), "fp4"))

    def open(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> BlockedWeight | None:
        weight, state_name = f"{name}.weight", f"{name}.weight.quant_state.bitsandbytes__{self.table}"
        if not any(each in files for each in (state_name, f"{weight}.absmax")):
            return None
        names = [weight, f"{weight}.absmax", f"{weight}.quant_map", state_name]

        def take(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            return files.take(name, shape, (dtype,), by=CONFIG_FILE)

        size = math.prod(shape)
        if shape[1] % 2:
            raise ValueError(f"{files.path}: {name} of shape {shape} has rows that end in the middle of a byte")
        codes = take(weight, (size // 2, 1), torch.uint8)
        if not torch.equal(take(names[2], (16,), torch.float32), torch.tensor(TABLES[self.table])):
            raise ValueError(f"{files.file_of(names[2])}: {names[2]} is not the table of {self.table}")
        state = _read_state(files, state_name)
        nested = f"{weight}.nested_absmax" in files
        try:
            one_of(state, "quant_type", (self.table,))
            one_of(state, "shape", (list(shape),))
            block_size = one_of(state, "blocksize", _BLOCK_SIZES)
            nested_size = one_of(state, "nested_blocksize", _BLOCK_SIZES) if nested else 0
            offset = state.get("nested_offset", 0.0)
            if not isinstance(offset, float) or not math.isfinite(offset):
                raise ValueError(f"nested_offset must be a finite number, got {offset!r}")
        except ValueError as error:
            raise ValueError(f"{files.file_of(state_name)}: {state_name}: {error}") from None
        blocks = -(-size // block_size)
        absmax = take(names[1], (blocks,), torch.uint8 if nested else torch.float32)
        double: DoubleQuantization | None = None
        if nested:
            names += [f"{weight}.nested_absmax", f"{weight}.nested_quant_map"]
            double = DoubleQuantization(
                absmax=take(names[-2], (-(-blocks // nested_size),), torch.float32),
                table=take(names[-1], (256,), torch.float32),
                block_size=nested_size,
                offset=offset,
            )
        return BlockedWeight(
            what=f"{files.file_of(weight)}: {name}",
            format=Lut4(table=self.table, group=block_size),
            names=tuple(names),
            nbytes=sum(files[each].nbytes for each in names),
            shape=shape,
            codes=codes,
            absmax=absmax,
            double=double,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DoubleQuantization:
    """How scales are quantized."""

    absmax: torch.Tensor
    table: torch.Tensor
    block_size: int
    offset: float

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The scales of codes (N,), fp32, in bitsandbytes' own operations."""
        scales = self.absmax.repeat_interleave(self.block_size)[: len(codes)]
        return self.table[codes.int()] * scales + self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockedWeight:
    """See `StoredWeight`. Blocks run over the ends of rows: where they do, smaller groups repeat their scales."""

    what: str
    format: Lut4
    names: tuple[str, ...]
    nbytes: int
    shape: tuple[int, int]
    codes: torch.Tensor
    absmax: torch.Tensor
    double: DoubleQuantization | None
    parts = ("codes", "scales")

    @property
    def kind(self) -> str:
        return f"{self.format.table.upper()} with blocks of {self.format.group}"

    def holds(self, group: int | None) -> bool:
        return group is not None and self.format.group % group == 0 and self.shape[1] % group == 0

    def read(self, part: str, step: int) -> torch.Tensor:
        if part == "codes":
            codes = self.codes.view(self.shape[0], -1)
            return codes >> 4 | codes << 4
        scales = self.absmax if self.double is None else self.double.dequantize(self.absmax)
        if not scales.isfinite().all():
            raise ValueError(f"{self.what}: scales (absmax) must be finite numbers")
        count = math.prod(self.shape) // step
        return scales.repeat_interleave(self.format.group // step)[:count].view(self.shape[0], -1)


def _read_state(files: TensorFiles, name: str) -> dict[str, Any]:
    if name not in files:
        raise ValueError(f"{files.path}: tensor {name!r} is missing")
    content = files[name]
    if content.dtype == torch.uint8 and content.numel() <= _LARGEST_STATE:
        try:
            state = json.loads(content.numpy().tobytes())
        except (ValueError, RecursionError):
            state = None
        if isinstance(state, dict):
            return state
    raise ValueError(f"{files.file_of(name)}: {name} must be bytes of a small JSON object")
