"""Owns how quantized weights lie in a GPU's memory: in the order in which a product's threads take them.

Knows no product. A tile is 16 outputs, a block is a tile by 32 or 64 inputs. A block's codes are, for each of 32
threads, neighbouring words that hold what the thread multiplies. Of the other parts, each group's values for the
outputs of a tile are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from llama2.weights.formats import Weight
from llama2.weights.formats.groups import pack, unpack
from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.formats.plain import Plain
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8

TILE = 16
# Codes that are arranged at once, which takes a few times as many bytes.
_AT_ONCE = 1 << 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """A weight (F, C), its F outputs padded to whole tiles.

    `groups` says how many inputs share a value of each part. `chunk` inputs share all of them; a block has one or two
    chunks. `zero` is subtracted from codes. If they are places in a table, `table` has the low bytes of its 16 values,
    four in an int32, then the high bytes.
    """

    outputs: int
    inputs: int
    bits: int
    block: int
    chunk: int
    zero: int
    parts: Mapping[str, torch.Tensor]
    groups: Mapping[str, int]
    table: torch.Tensor | None

    @property
    def tiles(self) -> int:
        return -(-self.outputs // TILE)


def arrange(weight: Weight, dtype: torch.dtype) -> tuple[Quantized, ...] | None:
    """A weight's parts in that order, in the same memory; only the outputs that fill no tile get memory of their own.

    None: products in `dtype` need more bits than its codes become, or its groups or inputs are too small for a block;
    it is left as it is.
    """
    if isinstance(weight.format, Plain) or dtype.itemsize != 2:
        return None
    bits = 8 if isinstance(weight.format, Q8) else 4
    outputs = len(weight.parts["codes"])
    parts = {name: part.view(outputs, -1) for name, part in weight.parts.items()}
    inputs = parts["codes"].shape[1] * 8 // bits
    groups = {name: inputs // part.shape[1] for name, part in parts.items() if name != "codes"}
    chunk = next((size for size in (64, 32, 16) if not any(group % size for group in groups.values())), None)
    block = 64 if bits == 4 and chunk != 16 and inputs % 64 == 0 else 32
    if chunk is None or inputs % block:
        return None
    table = None
    if isinstance(weight.format, Lut4):
        table = _table(weight.format.table, dtype).to(weight.parts["codes"].device)

    def one(parts: Mapping[str, torch.Tensor], outputs: int) -> Quantized:
        for name, part in parts.items():
            _arrange_part(name, part, bits, block, chunk, in_pairs=bits == 4 and table is None)
        return Quantized(
            outputs=outputs,
            inputs=inputs,
            bits=bits,
            block=block,
            chunk=min(chunk, block),
            zero=weight.format.zero or 0 if isinstance(weight.format, Q4) else 0,
            parts={name: part.view(torch.int32) if name == "codes" else part for name, part in parts.items()},
            groups=groups,
            table=table,
        )

    whole = outputs - outputs % TILE
    found = []
    if whole:
        found.append(one({name: part[:whole] for name, part in parts.items()}, whole))
    if whole < outputs:
        tails = {name: part.new_zeros(TILE, part.shape[1]) for name, part in parts.items()}
        for name, part in parts.items():
            tails[name][: outputs - whole] = part[whole:]
        found.append(one(tails, outputs - whole))
    return tuple(found)


def _table(name: str, dtype: torch.dtype) -> torch.Tensor:
    values = torch.tensor(TABLES[name], dtype=torch.float32).to(dtype)
    return values.view(torch.uint8).view(16, 2).T.contiguous().view(torch.int32).flatten()


def _arrange_part(name: str, part: torch.Tensor, bits: int, block: int, chunk: int, *, in_pairs: bool) -> None:
    rows = max(1, _AT_ONCE // (part.shape[1] * TILE)) * TILE
    for piece in part.split(rows):
        if name == "codes":
            piece.view(-1).copy_(_arranged_codes(piece, bits, block, chunk, in_pairs=in_pairs).reshape(-1))
        else:
            piece.view(-1).copy_(piece.view(-1, TILE, part.shape[1]).transpose(1, 2).reshape(-1))


def _arranged_codes(codes: torch.Tensor, bits: int, block: int, chunk: int, *, in_pairs: bool) -> torch.Tensor:
    """Codes (F, ...) by tile, block and thread.

    Thread 4 g + t has the outputs g and g + 8 of the tile, as `mma` wants it (PTX ISA, m16n8k16). Of 32 inputs it has
    the 8 from 8 t on; where 16 of them are a chunk, the 4 from 4 t on of either half. Of 8 codes of 4 bits, `in_pairs`,
    neighbours are 16 bits apart.
    """
    values = unpack(codes) if bits == 4 else codes
    order = ("half", "thread") if chunk == 16 else ("thread", "half")
    sizes = {"thread": 4, "half": 2}
    axes = ("tile", "row", "g", "block", "part", *order, "input")
    shape = (-1, 2, 8, values.shape[1] // block, block // 32, *(sizes[name] for name in order), 4)
    wanted = ("tile", "block", "g", "thread", "part", "row", "half", "input")
    values = values.view(shape).permute([axes.index(name) for name in wanted])
    if bits == 8:
        return values
    values = values.flatten(-2)
    return pack(values.unflatten(-1, (4, 2)).mT.flatten(-2) if in_pairs else values)
