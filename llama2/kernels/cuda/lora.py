"""Owns what adapters (LoRA) add to products on a GPU, as two Triton kernels over each row's slot.

The first makes a few fp32 values of each row, the second adds what follows from them to the product's outputs. Up to
FEW_ROWS rows a program has one row, whose bits do not depend on the others; of more rows a program has a tile, and the
tile's slots in turn. Where no row has an adapter every program ends at once.

Shape suffixes in the kernels: M rows of a tile, R ranks, K inputs of a step, N outputs of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama2.adapters.products import LoraProduct
from llama2.kernels.cuda.launch import announce, await_earlier, launch_options

# Rows up to which each is a program's own.
FEW_ROWS = 32
# Inputs that one program sums over: others have the rest, so that enough programs read a few rows' adapters.
SPLIT = 1024
# A product of tensor cores has at least as many rows, and ranks.
TILE = 16


def add_lora(
    y_TF: torch.Tensor, x_TC: torch.Tensor, lora: LoraProduct, slots_T: torch.Tensor, *, pdl: bool = False
) -> torch.Tensor:
    """Adds to y in place. Both are contiguous."""
    (rows, inputs), (parts, max_rank) = x_TC.shape, lora.a_SPRC.shape[1:3]
    if not rows:
        return y_TF
    assert x_TC.is_contiguous()
    assert y_TF.is_contiguous()
    tile, block = (1, 128) if rows <= FEW_ROWS else (TILE, 32)
    splits = triton.cdiv(inputs, SPLIT)
    padded_rank = max(TILE, triton.next_power_of_2(max_rank))
    shrunk = torch.empty(splits, rows, parts, padded_rank, dtype=torch.float32, device=x_TC.device)
    constants = {"PARTS": parts, "PADDED_R": padded_rank, "M": tile}
    options = {"num_warps": 4, **launch_options(pdl)}
    _shrink[(triton.cdiv(rows, tile), parts, splits)](
        x_TC,
        lora.a_SPRC,
        lora.ranks_SP,
        lora.scales_SP,
        slots_T,
        shrunk,
        rows,
        lora.a_SPRC.stride(0),
        lora.ranks_SP.stride(0),
        lora.scales_SP.stride(0),
        C=inputs,
        K=max(TILE, 2048 // padded_rank),
        SPLIT=SPLIT,
        MAX_RANK=max_rank,
        **constants,
        **options,
    )
    outputs = (*lora.outputs, 0, 0)
    _expand[(triton.cdiv(rows, tile), sum(triton.cdiv(each, block) for each in lora.outputs))](
        y_TF,
        lora.b_SRF,
        lora.ranks_SP,
        slots_T,
        shrunk,
        rows,
        lora.b_SRF.stride(0),
        lora.ranks_SP.stride(0),
        SPLITS=splits,
        F0=outputs[0],
        F1=outputs[1],
        F2=outputs[2],
        N=block,
        R=TILE,
        **constants,
        **options,
    )
    return y_TF


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["ranks", "scales", "slots"])
def _shrink(
    x,
    a,
    ranks,
    scales,
    slots,
    shrunk,
    rows,
    a_stride,
    ranks_stride,
    scales_stride,
    C: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_RANK: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_R: tl.constexpr,
    M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of rows, part, split of the inputs): its share of shrunk (splits, rows, parts, ranks), with 0 for
    the ranks that a row's adapter does not have."""
    announce(PDL)
    await_earlier(PDL)
    part, split = tl.program_id(1), tl.program_id(2)
    rank_R = tl.arange(0, PADDED_R)
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    slot_M = tl.load(slots + row_M, mask=row_M < rows, other=-1)
    x_M = x + row_M.to(tl.int64) * C
    sum_MR = tl.zeros((M, PADDED_R), tl.float32)
    slot = tl.max(slot_M, 0)
    while slot >= 0:
        rank = tl.load(ranks + slot * ranks_stride + part)
        a_R = a + slot.to(tl.int64) * a_stride + (part * MAX_RANK + rank_R) * C
        own_MR = tl.zeros((M, PADDED_R), tl.float32)
        for start in range(0, SPLIT, K):
            input_K = split * SPLIT + start + tl.arange(0, K)
            is_input_K = input_K < C
            a_RK = tl.load(
                a_R[:, None] + input_K[None, :], mask=(rank_R < rank)[:, None] & is_input_K[None, :], other=0.0
            )
            x_MK = tl.load(
                x_M[:, None] + input_K[None, :], mask=(row_M < rows)[:, None] & is_input_K[None, :], other=0.0
            )
            if M == 1:
                own_MR += tl.sum(a_RK.to(tl.float32) * x_MK.to(tl.float32), 1)[None, :]
            else:
                own_MR = tl.dot(x_MK, tl.trans(a_RK), own_MR, input_precision="ieee")
        scale = tl.load(scales + slot * scales_stride + part)
        sum_MR = tl.where((slot_M == slot)[:, None], own_MR * scale, sum_MR)
        slot = tl.max(tl.where(slot_M < slot, slot_M, -1), 0)
    at_M = shrunk + ((split * rows + row_M) * PARTS + part).to(tl.int64) * PADDED_R
    tl.store(at_M[:, None] + rank_R[None, :], sum_MR, mask=(slot_M >= 0)[:, None])


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["ranks", "slots"])
def _expand(
    y,
    b,
    ranks,
    slots,
    shrunk,
    rows,
    b_stride,
    ranks_stride,
    SPLITS: tl.constexpr,
    F0: tl.constexpr,
    F1: tl.constexpr,
    F2: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    PADDED_R: tl.constexpr,
    M: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of rows, block of a part's outputs), R ranks at a time. F0, F1 and F2 are the parts' outputs."""
    announce(PDL)
    await_earlier(PDL)
    block = tl.program_id(1)
    blocks0: tl.constexpr = (F0 + N - 1) // N
    blocks1: tl.constexpr = blocks0 + (F1 + N - 1) // N
    is_beyond_0, is_beyond_1 = block >= blocks0, block >= blocks1
    part = is_beyond_0.to(tl.int32) + is_beyond_1.to(tl.int32)
    first = tl.where(is_beyond_1, F0 + F1, tl.where(is_beyond_0, F0, 0))
    size = tl.where(is_beyond_1, F2, tl.where(is_beyond_0, F1, F0))
    before = tl.where(is_beyond_1, blocks1, tl.where(is_beyond_0, blocks0, 0))
    output_N = (block - before) * N + tl.arange(0, N)
    is_output_N = output_N < size
    row_M = tl.program_id(0) * M + tl.arange(0, M)
    slot_M = tl.load(slots + row_M, mask=row_M < rows, other=-1)
    slot = tl.max(slot_M, 0)
    if slot >= 0:
        sum_MN = tl.zeros((M, N), tl.float32)
        while slot >= 0:
            is_own_M = slot_M == slot
            rank = tl.load(ranks + slot * ranks_stride + part)
            own_MN = tl.zeros((M, N), tl.float32)
            for start in range(0, rank, R):
                rank_R = start + tl.arange(0, R)
                shrunk_MR = tl.zeros((M, R), tl.float32)
                for split in tl.range(0, SPLITS, num_stages=1):
                    at_M = shrunk + ((split * rows + row_M) * PARTS + part).to(tl.int64) * PADDED_R
                    shrunk_MR += tl.load(at_M[:, None] + rank_R[None, :], mask=is_own_M[:, None], other=0.0)
                b_RN = tl.load(
                    b + slot.to(tl.int64) * b_stride + (rank_R * (F0 + F1 + F2))[:, None] + (first + output_N)[None, :],
                    mask=(rank_R < rank)[:, None] & is_output_N[None, :],
                    other=0.0,
                ).to(tl.float32)
                if M == 1:
                    own_MN += tl.sum(tl.trans(shrunk_MR) * b_RN, 0)[None, :]
                else:
                    own_MN = tl.dot(shrunk_MR, b_RN, own_MN, input_precision="ieee")
            sum_MN = tl.where(is_own_M[:, None], own_MN, sum_MN)
            slot = tl.max(tl.where(slot_M < slot, slot_M, -1), 0)
        at_MN = y + row_M[:, None].to(tl.int64) * (F0 + F1 + F2) + (first + output_N)[None, :]
        mask_MN = (slot_M >= 0)[:, None] & is_output_N[None, :]
        y_MN = tl.load(at_MN, mask=mask_MN, other=0.0).to(tl.float32)
        tl.store(at_MN, (y_MN + sum_MN).to(y.dtype.element_ty), mask=mask_MN)
