"""Owns what one forward pass attends to: which rows are whose, and where their keys and values lie in the cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llama2.adapters.products import BatchAdapters
from llama2.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One sequence's share of a step: rows [row, row + length) are the last `length` of its `seq_len` positions."""

    row: int
    length: int
    seq_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The T tokens of one forward pass, of S sequences, without padding between them; tensors on the model's device.

    The `num_single` sequences that bring one token each, as all do that decode, come first; None where only the tensors
    know how many, in a pass that was recorded for any such number. Sequence s has the rows
    [query_starts_S1[s], query_starts_S1[s + 1]), is seq_lens_S[s] positions long after the pass, and its block table is
    block_tables_SN[s] (int32, padded with 0). positions_T says where each token is in its sequence, and
    slot_mapping_T in the cache (int64). A recorded pass has no `spans`, and may have tokens and sequences that are
    nobody's. Without `adapters` no row has one.
    """

    positions_T: torch.Tensor
    slot_mapping_T: torch.Tensor
    query_starts_S1: torch.Tensor
    seq_lens_S: torch.Tensor
    block_tables_SN: torch.Tensor
    spans: tuple[Span, ...]
    num_single: int | None
    cache: KVCache
    adapters: BatchAdapters | None = None
