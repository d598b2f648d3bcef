"""Owns attention over the paged cache: what one forward pass attends to, and the arithmetic of it per backend.

Knows no weights and no ranks: it sees the heads that this rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llama2.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One sequence's share of a step: rows [row, row + length) hold its positions [start, start + length)."""

    row: int
    length: int
    start: int
    blocks_N: torch.Tensor

    @property
    def context(self) -> int:
        """Positions that the last row sees, itself included."""
        return self.start + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The T tokens of one forward pass, of many sequences, without padding. Tensors are int64 on the model's device."""

    positions_T: torch.Tensor
    slots_T: torch.Tensor
    spans: tuple[Span, ...]
    cache: KVCache


def paged_attention(
    q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor, batch: Batch, layer: int
) -> torch.Tensor:
    """Store this step's keys and values, then attend causally over each sequence's own positions.

    H query heads share K key heads in groups of H / K, in order. Returns (T, H, D).
    """
    batch.cache.write(layer, k_TKD, v_TKD, batch.slots_T)
    out_THD = torch.empty_like(q_THD)
    for span in batch.spans:
        rows = slice(span.row, span.row + span.length)
        k_LKD, v_LKD = batch.cache.read(layer, span.blocks_N, span.context)
        out_THD[rows] = _attend(q_THD[rows], k_LKD, v_LKD, span.start)
    return out_THD


def _attend(q_THD: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, start: int) -> torch.Tensor:
    """Attention of one sequence's T newest positions over its L = start + T.

    The query heads of a group are folded into the query axis, so that a key head is read once for all of them and
    never repeated: on a CPU, SDPA's own `enable_gqa` takes a path several times slower.
    """
    length, heads, head_dim = q_THD.shape
    kv_heads = k_LKD.shape[1]
    group = heads // kv_heads
    q_KRD = (
        q_THD.view(length, kv_heads, group, head_dim).permute(1, 2, 0, 3).reshape(kv_heads, group * length, head_dim)
    )
    mask = None
    if length > 1:
        mask_TL = torch.ones(length, start + length, dtype=torch.bool, device=q_THD.device).tril(start)
        mask = mask_TL.repeat(group, 1)
    out_KRD = F.scaled_dot_product_attention(
        q_KRD[None], k_LKD.transpose(0, 1)[None], v_LKD.transpose(0, 1)[None], mask
    )
    return out_KRD[0].view(kv_heads, group, length, head_dim).permute(2, 0, 1, 3).reshape(length, heads, head_dim)
