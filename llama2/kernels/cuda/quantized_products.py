"""Owns products with quantized weights on a GPU, as Triton kernels: codes become values in registers.

For few rows a kernel multiplies by the codes themselves, so that a product's time is that of their way through memory.
Codes are exact in 16 bits, sums are in fp32, and each group's sum is multiplied by its scale, an output's at the end by
that of the output, if it has one: only the values of a table are rounded. Each row is computed by itself, in the same
order for every number of rows. For more rows the values are written out, in 16 bits.

Shape suffixes in the kernels: W warps, each with a block of inputs of its own, K inputs of a chunk, M outputs of a
tile, R rows of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from llama2.kernels.cuda.launch import announce, await_earlier, launch_options
from llama2.kernels.cuda.pointwise import silu
from llama2.kernels.cuda.quantized_values import empty, fetch, halves, load_table, unscaled_values
from llama2.kernels.cuda.quantized_weights import TILE, Quantized

# Rows up to which codes are multiplied as they are.
MOST_ROWS = 32
# Numbers whose lowest bit is worth 1 and whose lowest four are 0, twice in 32 bits. Not a constant of the kernels: a
# logical operation has room for one, and the mask is one.
_BIAS_BITS = {torch.bfloat16: 0x43004300, torch.float16: 0x64006400}


def linear(
    x_RC: torch.Tensor,
    weight: Quantized,
    out_RF: torch.Tensor,
    *,
    gated: bool = False,
    pdl: bool = False,
    **shape: int,
) -> None:
    """x (R, C) times the transposed weight, into `out_RF`, whose rows may lie apart; for up to MOST_ROWS rows.

    With `gated` silu of the first half of the outputs times the second half, (R, F / 2): both must be whole tiles.
    `shape` is for benchmarks: the parts of `product_shape` to override.
    """
    rows = len(x_RC)
    if not rows:
        return
    chosen = {**product_shape(weight, rows), **shape}
    tiles, warps = 2 if gated else chosen["TILES"], chosen["num_warps"]
    _linear_quantized[(triton.cdiv(weight.tiles, tiles),)](
        x_RC.view(torch.int32),
        *_parts(weight),
        out_RF,
        _BIAS_BITS[x_RC.dtype],
        weight.tiles,
        weight.outputs // 2 if gated else weight.outputs,
        out_RF.stride(0),
        rows,
        PADDED_R=max(8, triton.next_power_of_2(rows)),
        TILES=tiles,
        GATED=gated,
        **_constants(weight, x_RC),
        W=warps,
        num_warps=warps,
        **launch_options(pdl),
    )


def product_shape(weight: Quantized, rows: int) -> dict[str, int]:
    """Tiles and warps of a program. The warps share the inputs, so that their number must not depend on the rows."""
    blocks = weight.inputs // weight.block
    return {"TILES": 1 if weight.tiles < 512 and rows <= 8 else 2, "num_warps": 8 if blocks >= 32 else 4}


def dequantize(weight: Quantized, first_tile: int, out_FC: torch.Tensor, *, pdl: bool = False) -> None:
    """The values of as many outputs from a tile on as `out_FC` has rows, a multiple of TILE."""
    warps = 4
    grid = (len(out_FC) // TILE, triton.cdiv(weight.inputs // weight.block, warps))
    _dequantize[grid](
        *_parts(weight),
        out_FC,
        _BIAS_BITS[out_FC.dtype],
        first_tile,
        **_constants(weight, out_FC),
        W=warps,
        num_warps=warps,
        **launch_options(pdl),
    )


def _parts(weight: Quantized) -> tuple[torch.Tensor | None, ...]:
    names = ("codes", "scales", "zeros", "mins", "super_scales", "super_mins", "output_scales")
    return (*(weight.parts.get(name) for name in names), weight.table)


def _constants(weight: Quantized, x: torch.Tensor) -> dict[str, Any]:
    """What the kernels' code depends on. A Triton interpreter, on a CPU, has no instructions of a GPU."""
    return {
        "C": weight.inputs,
        "BITS": weight.bits,
        "BLOCK": weight.block,
        "CHUNK": weight.chunk,
        "ZERO": weight.zero,
        "GROUP": weight.groups["scales"],
        "SUPER_GROUP": weight.groups.get("super_scales"),
        "ON_GPU": x.device.type != "cpu",
    }


@triton.jit(do_not_specialize=["rows"])
def _linear_quantized(
    x,
    codes,
    scales,
    zeros,
    mins,
    super_scales,
    super_mins,
    output_scales,
    table,
    out,
    bias,
    tiles,
    outputs,
    out_stride,
    rows,
    PADDED_R: tl.constexpr,
    TILES: tl.constexpr,
    GATED: tl.constexpr,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    ON_GPU: tl.constexpr,
    W: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (TILES tiles; with GATED one of either half). Weights are fetched two steps ahead, x one.

    A warp sums over its own blocks, every W-th; the warps' sums are added at the end. `x` has two values in each int32:
    what is carried from step to step is not taken apart.
    """
    announce(PDL)
    program = tl.program_id(0)
    blocks: tl.constexpr = C // BLOCK
    steps: tl.constexpr = (blocks + W - 1) // W
    needs_sums: tl.constexpr = zeros is not None or mins is not None
    per_chunk: tl.constexpr = 1 + needs_sums + 2 * (super_scales is not None)
    places = load_table(table)
    tile = empty()
    weight = empty()
    next_weight = empty()
    sums = empty()
    scales_of_outputs = empty()
    for index in tl.static_range(TILES):
        # A tile too many is the last one again, and is not written.
        tile = tile + (program + index * (tiles // 2) if GATED else min(program * TILES + index, tiles - 1),)
    for index in tl.static_range(TILES):
        parts = fetch(codes, scales, zeros, mins, super_scales, super_mins, tile[index], 0,
                       C, BITS, BLOCK, CHUNK, GROUP, SUPER_GROUP, W)  # fmt: skip
        weight = weight + (parts,)
        parts = fetch(codes, scales, zeros, mins, super_scales, super_mins, tile[index], 1,
                       C, BITS, BLOCK, CHUNK, GROUP, SUPER_GROUP, W)  # fmt: skip
        next_weight = next_weight + (parts,)
        sums = sums + (tl.zeros((W, 16, PADDED_R), tl.float32),)
        if output_scales is not None:
            scales_of_outputs = scales_of_outputs + (tl.load(output_scales + tile[index] * 16 + tl.arange(0, 16)),)
    await_earlier(PDL)
    dtype: tl.constexpr = out.dtype.element_ty
    words = _fetch_x(x, 0, rows, PADDED_R, C, BLOCK, W)
    for step in tl.range(0, steps, num_stages=1):
        next_words = _fetch_x(x, step + 1, rows, PADDED_R, C, BLOCK, W)
        last_weight = empty()
        for index in tl.static_range(TILES):
            parts = fetch(codes, scales, zeros, mins, super_scales, super_mins, tile[index], step + 2,
                           C, BITS, BLOCK, CHUNK, GROUP, SUPER_GROUP, W)  # fmt: skip
            last_weight = last_weight + (parts,)
        x_WKR = _x_of_chunks(words, PADDED_R, BLOCK, CHUNK, W, dtype)
        x_sums = empty()
        if needs_sums:
            for chunk in tl.static_range(BLOCK // CHUNK):
                ones_WMK = tl.full((W, 16, CHUNK), 1.0, dtype)
                x_sums = x_sums + (tl.dot(ones_WMK, x_WKR[chunk]),)
        longer = empty()
        for index in tl.static_range(TILES):
            sum_WMR = sums[index]
            values = unscaled_values(weight[index][0], places, bias, BITS, BLOCK, ZERO, ON_GPU, W, dtype)
            values_WMK = _values_of_chunks(values, BLOCK, CHUNK, W)
            for chunk in tl.static_range(BLOCK // CHUNK):
                # Its scale, then its zero or minimum, then the second level of scale and minimum.
                of_chunk = weight[index][1 + chunk * per_chunk : 1 + (chunk + 1) * per_chunk]
                scale_WM = of_chunk[0].to(tl.float32)
                if super_scales is not None:
                    scale_WM = scale_WM * of_chunk[2].to(tl.float32)
                dot_WMR = tl.dot(values_WMK[chunk], x_WKR[chunk])
                if zeros is not None:
                    dot_WMR -= x_sums[chunk] * of_chunk[1].to(tl.float32)[:, :, None]
                sum_WMR += dot_WMR * scale_WM[:, :, None]
                if mins is not None:
                    min_WM = of_chunk[1].to(tl.float32)
                    if super_mins is not None:
                        min_WM = min_WM * of_chunk[3].to(tl.float32)
                    sum_WMR += x_sums[chunk] * min_WM[:, :, None]
            longer = longer + (sum_WMR,)
        sums = longer
        weight = next_weight
        next_weight = last_weight
        words = next_words
    totals = empty()
    for index in tl.static_range(TILES):
        total_MR = tl.sum(sums[index], 0)
        if output_scales is not None:
            total_MR *= scales_of_outputs[index][:, None]
        totals = totals + (total_MR,)
    row_R = tl.arange(0, PADDED_R)
    if GATED:
        _store(out, silu(totals[0]) * totals[1], tile[0], row_R, outputs, out_stride, rows)
    else:
        for index in tl.static_range(TILES):
            if program * TILES + index < tiles:
                _store(out, totals[index], tile[index], row_R, outputs, out_stride, rows)


@triton.jit(do_not_specialize=["first_tile"])
def _dequantize(
    codes,
    scales,
    zeros,
    mins,
    super_scales,
    super_mins,
    output_scales,
    table,
    out,
    bias,
    first_tile,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    ON_GPU: tl.constexpr,
    W: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile, W of its blocks)."""
    announce(PDL)
    tile, step = first_tile + tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = out.dtype.element_ty
    weight = fetch(codes, scales, zeros, mins, super_scales, super_mins, tile, step,
                    C, BITS, BLOCK, CHUNK, GROUP, SUPER_GROUP, W)  # fmt: skip
    values = unscaled_values(weight[0], load_table(table), bias, BITS, BLOCK, ZERO, ON_GPU, W, dtype)
    # From (W, g, thread, part, row, half, input) to the order of the inputs.
    values = tl.permute(values, (0, 4, 1, 3, 5, 2, 6) if CHUNK == 16 else (0, 4, 1, 3, 2, 5, 6))
    value_WMHK = tl.reshape(values, (W, 16, BLOCK // CHUNK, CHUNK)).to(tl.float32)
    per_chunk: tl.constexpr = 1 + (zeros is not None or mins is not None) + 2 * (super_scales is not None)
    if zeros is not None:
        value_WMHK -= _both(weight, 2, BLOCK // CHUNK, per_chunk)
    scale_WMH1 = _both(weight, 1, BLOCK // CHUNK, per_chunk)
    if super_scales is not None:
        scale_WMH1 = scale_WMH1 * _both(weight, 3, BLOCK // CHUNK, per_chunk)
    if output_scales is not None:
        scale_M = tl.load(output_scales + tile * 16 + tl.arange(0, 16))
        scale_WMH1 = scale_WMH1 * scale_M[None, :, None, None]
    value_WMHK *= scale_WMH1
    if mins is not None:
        min_WMH1 = _both(weight, 2, BLOCK // CHUNK, per_chunk)
        if super_mins is not None:
            min_WMH1 = min_WMH1 * _both(weight, 4, BLOCK // CHUNK, per_chunk)
        value_WMHK += min_WMH1
    await_earlier(PDL)
    block_W = step * W + tl.arange(0, W)
    output_M = (tl.program_id(0) * 16 + tl.arange(0, 16)).to(tl.int64)
    input_WK = block_W[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(
        out + output_M[None, :, None] * C + input_WK[:, None, :],
        tl.reshape(value_WMHK, (W, 16, BLOCK)).to(dtype),
        mask=(input_WK < C)[:, None, :],
    )


@triton.jit
def _both(weight, at: tl.constexpr, CHUNKS: tl.constexpr, per_chunk: tl.constexpr):
    """A value of each group for all chunks of a block: fp32 (W, M, chunks, 1)."""
    value_WMH = tl.join(weight[at], weight[at + per_chunk]) if CHUNKS == 2 else weight[at][:, :, None]
    return value_WMH.to(tl.float32)[:, :, :, None]


@triton.jit
def _store(out, sum_MR, tile, row_R, outputs, out_stride, rows):
    output_M = tile * 16 + tl.arange(0, 16)
    at_MR = out + row_R[None, :].to(tl.int64) * out_stride + output_M[:, None]
    tl.store(at_MR, sum_MR.to(out.dtype.element_ty), mask=(output_M < outputs)[:, None] & (row_R < rows)[None, :])


@triton.jit
def _fetch_x(x, step, rows, PADDED_R: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr):
    """Words (eights of rows, parts of 32 inputs, W, 8 rows, 16): one warp has all of a block, a thread 16 bytes."""
    row = (tl.arange(0, PADDED_R // 8) * 8)[:, None, None, None, None] + tl.arange(0, 8)[None, None, None, :, None]
    block = (step * W + tl.arange(0, W))[None, None, :, None, None]
    part = tl.arange(0, BLOCK // 32)[None, :, None, None, None]
    word = block * (BLOCK // 2) + part * 16 + tl.arange(0, 16)[None, None, None, None, :]
    return tl.load(x + row * (C // 2) + word, mask=(row < rows) & (word < C // 2), other=0)


@triton.jit
def _x_of_chunks(
    words, PADDED_R: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr, dtype: tl.constexpr
):
    """The values of `_fetch_x` for each chunk of a block: (W, K, R). The order of the inputs is that of the codes."""
    values = halves(words, dtype)
    if CHUNK == 16:
        # (eights, part, W, row, half, thread, input)
        values = tl.reshape(values, (PADDED_R // 8, BLOCK // 32, W, 8, 2, 4, 4))
        chunks = tl.split(tl.permute(values, (2, 1, 5, 6, 0, 3, 4)))
    else:
        # (eights, part, W, row, thread, half, input)
        values = tl.reshape(values, (PADDED_R // 8, BLOCK // 32, W, 8, 4, 2, 4))
        if CHUNK < BLOCK:
            chunks = tl.split(tl.permute(values, (2, 5, 4, 6, 0, 3, 1)))
        else:
            chunks = (tl.permute(values, (2, 1, 5, 4, 6, 0, 3)),)
    x_WKR = empty()
    for chunk in tl.static_range(BLOCK // CHUNK):
        x_WKR = x_WKR + (tl.reshape(chunks[chunk], (W, CHUNK, PADDED_R)),)
    return x_WKR


@triton.jit
def _values_of_chunks(values, BLOCK: tl.constexpr, CHUNK: tl.constexpr, W: tl.constexpr):
    """Values (W, g, thread, part, row, half, input) for each chunk of a block: (W, M, K)."""
    if CHUNK == 16:
        chunks = tl.split(tl.permute(values, (0, 4, 1, 3, 2, 6, 5)))
    elif CHUNK < BLOCK:
        chunks = tl.split(tl.permute(values, (0, 4, 1, 5, 2, 6, 3)))
    else:
        chunks = (tl.permute(values, (0, 4, 1, 3, 5, 2, 6)),)
    values_WMK = empty()
    for chunk in tl.static_range(BLOCK // CHUNK):
        values_WMK = values_WMK + (tl.reshape(chunks[chunk], (W, 16, CHUNK)),)
    return values_WMK
