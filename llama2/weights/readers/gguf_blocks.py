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
    scales = blocks["d"].astype(np.float32)[..., None] * blocks["scales"].astype(np.float32)
    return {"scales": scales.reshape(len(blocks), -1)}


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
}


def format_of(type: Type) -> Format | None:
    """The format that holds exactly what a type of GGUF holds; None if there is none."""
    layout = _LAYOUTS.get(type)
    return layout and layout.format


def read_part(data: _Array, type: Type, part: str) -> torch.Tensor:
    """A part (F, ...) of a weight whose outputs are the rows of `data`, bytes as the file has them."""
    layout = _LAYOUTS[type]
    blocks = data.view(np.dtype(layout.fields))
    if part != "codes":
        return torch.from_numpy(np.ascontiguousarray(layout.scales(blocks)[part]))
    alike = blocks.copy()
    for field, value in layout.ones.items():
        alike[field] = value
    values = torch.from_numpy(gguf.dequantize(alike.view(np.uint8), type)) + layout.zero
    if isinstance(layout.format, Q8):
        return values.to(torch.int8)
    if isinstance(layout.format, Lut4):
        values = torch.searchsorted(torch.tensor(TABLES[layout.format.table], dtype=torch.float32), values)
    return pack(values)
