"""Owns how the blocks of a quantized GGUF tensor become the parts of a format, with the same values to the bit.

The order of the codes in a block is the gguf package's affair: they are what it makes of blocks whose scales are one
and whose minima are zero. Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h

Shape suffixes: F outputs, N blocks of one, G groups of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type

from llama2.weights.formats import Format
from llama2.weights.formats.groups import pack
from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q4k import Q4K
from llama2.weights.formats.q8 import Q8

_Array = npt.NDArray[Any]


class _Layout(NamedTuple):
    """A type of GGUF: its format, the fields of a block, their values where each scale is one, and the parts."""

    format: Format
    fields: list[tuple[Any, ...]]
    ones: dict[str, Any]
    # From the blocks (F, N) all parts but the codes, (F, G) each.
    scales: Callable[[_Array], dict[str, _Array]]
    # What is added to the values of such blocks to have the codes.
    zero: int = 0


def _simple(blocks: _Array) -> dict[str, _Array]:
    return {"scales": blocks["d"]}


def _q4_1(blocks: _Array) -> dict[str, _Array]:
    return {"scales": blocks["d"], "mins": blocks["m"]}


def _q4_k(blocks: _Array) -> dict[str, _Array]:
    scales, mins = gguf.quants.Q4_K.get_scale_min(blocks["scales"].reshape(-1, 12))
    return _two_levels(blocks, scales, mins)


def _q2_k(blocks: _Array) -> dict[str, _Array]:
    return _two_levels(blocks, blocks["scales"] & 15, blocks["scales"] >> 4)


def _two_levels(blocks: _Array, scales: _Array, mins: _Array) -> dict[str, _Array]:
    outputs = len(blocks)
    return {
        "scales": scales.reshape(outputs, -1),
        "mins": mins.reshape(outputs, -1),
        "super_scales": blocks["d"],
        "super_mins": -blocks["dmin"],
    }


def _q6_k(blocks: _Array) -> dict[str, _Array]:
    return _multiplied(blocks, blocks["scales"])


def _six_bits(low: _Array, high: _Array) -> _Array:
    """Integers -32 to 31 (F, N, G) of their lower four bits and their upper two, which stand in the order of groups."""
    return (low & 15 | (high & 3) << 4).astype(np.float32) - 32


def _q3_k(blocks: _Array) -> dict[str, _Array]:
    low, high = blocks["scales"][..., :8], blocks["scales"][..., 8:]
    lows = np.concatenate([low >> shift for shift in (0, 4)], axis=-1)
    highs = np.concatenate([high >> shift for shift in (0, 2, 4, 6)], axis=-1)
    return _multiplied(blocks, _six_bits(lows, highs))


def _iq4_xs(blocks: _Array) -> dict[str, _Array]:
    lows = np.stack([blocks["scales_l"] >> shift for shift in (0, 4)], axis=-1).reshape(*blocks.shape, 8)
    highs = blocks["scales_h"][..., None] >> np.arange(0, 16, 2, dtype=np.uint16)
    return _multiplied(blocks, _six_bits(lows, highs))


def _multiplied(blocks: _Array, scales: _Array) -> dict[str, _Array]:
    """Scales (F, N, G) times that of their block."""
    products = blocks["d"].astype(np.float32)[..., None] * scales.astype(np.float32)
    return {"scales": products.reshape(len(blocks), -1)}


def _mxfp4(blocks: _Array) -> dict[str, _Array]:
    # Half of 2^(e - 127), since the table has twice the values.
    return {"scales": np.ldexp(np.float32(1), blocks["e"].astype(np.int32) - 128)}


_D = ("d", "<f2")
_LAYOUTS = {
    Type.Q4_0: _Layout(Q4(group=32, zero=8), [_D, ("qs", "u1", 16)], {"d": 1}, _simple, zero=8),
    Type.Q4_1: _Layout(Q4K(group=32), [_D, ("m", "<f2"), ("qs", "u1", 16)], {"d": 1, "m": 0}, _q4_1),
    Type.Q5_0: _Layout(Q8(group=32), [_D, ("qh", "u1", 4), ("qs", "u1", 16)], {"d": 1}, _simple),
    Type.Q8_0: _Layout(Q8(group=32), [_D, ("qs", "i1", 32)], {"d": 1}, _simple),
    Type.Q2_K: _Layout(
        Q4K(group=16, super_group=256),
        [("scales", "u1", 16), ("qs", "u1", 64), _D, ("dmin", "<f2")],
        {"scales": 1, "d": 1, "dmin": 0},
        _q2_k,
    ),
    Type.Q3_K: _Layout(
        Q4(group=16, zero=4, scales=torch.float32),
        [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D],
        # Six bits each, 33 for one: the lower four of sixteen, then the upper two.
        {"scales": [0x11] * 8 + [0xAA] * 4, "d": 1},
        _q3_k,
        zero=4,
    ),
    Type.Q4_K: _Layout(
        Q4K(group=32, super_group=256),
        [_D, ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)],
        # Six bits each: four scales, four minima, then the low halves of four more of both.
        {"scales": [1] * 4 + [0] * 4 + [1] * 4, "d": 1, "dmin": 0},
        _q4_k,
    ),
    Type.Q6_K: _Layout(
        Q8(group=16, scales=torch.float32),
        [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D],
        {"scales": 1, "d": 1},
        _q6_k,
    ),
    Type.IQ4_NL: _Layout(
        Lut4(table="iq4_nl", group=32, scales=torch.float16), [_D, ("qs", "u1", 16)], {"d": 1}, _simple
    ),
    Type.IQ4_XS: _Layout(
        Lut4(table="iq4_nl", group=32),
        [_D, ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)],
        # As in Q3_K.
        {"scales_h": 0xAAAA, "scales_l": 0x11, "d": 1},
        _iq4_xs,
    ),
    Type.MXFP4: _Layout(Lut4(table="mxfp4", group=32), [("e", "u1"), ("qs", "u1", 16)], {"e": 128}, _mxfp4),
}
_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
# Values that are dequantized at once.
_BLOCK = 1 << 22


def check_type(type: Type, whose: str) -> None:
    """Raises ValueError unless values of this type can be read."""
    if type in _PLAIN:
        return
    _, nbytes = gguf.GGML_QUANT_SIZES[type]
    try:
        gguf.dequantize(np.zeros((1, nbytes), np.uint8), type)
    except NotImplementedError:
        raise ValueError(f"{whose} is of type {type.name}, which the gguf package cannot dequantize") from None


def format_of(type: Type) -> Format | None:
    """The format that holds exactly what a quantized type of GGUF holds; None if there is none."""
    layout = _LAYOUTS.get(type)
    return layout and layout.format


def plain_dtype(type: Type) -> torch.dtype | None:
    """The dtype of a type of GGUF that is not quantized; None of one that is."""
    return _PLAIN.get(type)


def read_values(data: _Array, type: Type, dtype: torch.dtype) -> torch.Tensor:
    """The values (F, C) of a tensor, in the rows that `data` has: mapped, if they are stored so."""
    plain = _PLAIN.get(type)
    if plain is not None:
        return torch.from_numpy(data).view(plain).to(dtype)
    return _by_rows(data, lambda rows: torch.from_numpy(gguf.dequantize(rows, type)).to(dtype))


def read_part(data: _Array, type: Type, part: str) -> torch.Tensor:
    """A part (F, ...) of a weight whose outputs are the rows of `data`, bytes as the file has them."""
    layout = _LAYOUTS[type]
    fields = np.dtype(layout.fields)
    if part != "codes":
        return torch.from_numpy(np.ascontiguousarray(layout.scales(data.view(fields))[part]))
    return _by_rows(data, lambda rows: _codes(rows.view(fields), type, layout))


def _codes(blocks: _Array, type: Type, layout: _Layout) -> torch.Tensor:
    alike = blocks.copy()
    for field, value in layout.ones.items():
        alike[field] = value
    values = torch.from_numpy(gguf.dequantize(alike.view(np.uint8), type)) + layout.zero
    if isinstance(layout.format, Q8):
        return values.to(torch.int8)
    if isinstance(layout.format, Lut4):
        codes = torch.zeros(256, dtype=torch.uint8)
        table = torch.tensor(TABLES[layout.format.table], dtype=torch.int32)
        codes[table + 128] = torch.arange(len(table), dtype=torch.uint8)
        values = codes[values.int() + 128]
    return pack(values)


def _by_rows(data: _Array, read: Callable[[_Array], torch.Tensor]) -> torch.Tensor:
    """What `read` makes of all rows of a tensor, some at a time: it needs several times their memory."""
    step = max(1, _BLOCK // (2 * data.shape[1]))
    first = read(data[:step])
    result = first.new_empty((len(data), *first.shape[1:]))
    result[:step] = first
    for row in range(step, len(data), step):
        result[row : row + step] = read(data[row : row + step])
    return result
