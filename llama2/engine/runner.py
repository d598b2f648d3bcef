"""Owns one forward pass: from a plan's ids and block tables to tensors, through the model, to the logits asked for.

Knows no requests: every plan is complete by itself, so a rank keeps nothing between two plans but its KV cache.
"""

from __future__ import annotations

import torch

from llama2.attention import Batch, Span
from llama2.engine.scheduler import Plan
from llama2.kv_cache import KVCache
from llama2.model import Transformer


class Runner:
    """Runs plans on this rank. All ranks must run the same plans in the same order."""

    def __init__(self, model: Transformer, cache: KVCache, device: torch.device) -> None:
        self._model = model
        self._cache = cache
        self._device = device

    @torch.inference_mode()
    def run(self, plan: Plan) -> torch.Tensor | None:
        """Compute a plan. On rank 0: fp32 logits (R, V), the rows that the chunks ask for, in their order."""
        self._cache.copy(plan.copies)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows: list[int] = []
        spans: list[Span] = []
        size = self._cache.block_size
        for chunk in plan.chunks:
            row, length = len(tokens), len(chunk.token_ids)
            at = range(chunk.start, chunk.start + length)
            tokens += chunk.token_ids
            positions += at
            slots += [chunk.block_table[position // size] * size + position % size for position in at]
            if chunk.logits == "all":
                rows += range(row, row + length)
            elif chunk.logits == "last":
                rows.append(row + length - 1)
            blocks_N = self._tensor(list(chunk.block_table))
            spans.append(Span(row=row, length=length, start=chunk.start, blocks_N=blocks_N))
        batch = Batch(
            positions_T=self._tensor(positions), slots_T=self._tensor(slots), spans=tuple(spans), cache=self._cache
        )
        return self._model(self._tensor(tokens), batch, self._tensor(rows))

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
