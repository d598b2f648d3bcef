"""Owns one forward pass: from a plan's ids and block tables to tensors, through the model, to the logits asked for.

Knows no requests: every plan is complete by itself, so a rank keeps nothing between two plans but its KV cache.
"""

from __future__ import annotations

import torch

from llama2.batch import Batch, Span
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
        return self._model(*self._inputs(plan))

    def _inputs(self, plan: Plan) -> tuple[torch.Tensor, Batch, torch.Tensor]:
        """The plan's token ids (T), batch, and rows (R) whose logits it asks for."""
        size = self._cache.block_size
        # A stable sort: sequences with one token first, else as the plan has them. Logits stay in the plan's order.
        order = sorted(plan.chunks, key=lambda chunk: len(chunk.token_ids) > 1)
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        row_of: dict[int, int] = {}
        for chunk in order:
            row, length = len(tokens), len(chunk.token_ids)
            at = range(chunk.start, chunk.start + length)
            tokens += chunk.token_ids
            positions += at
            slots += [chunk.block_table[position // size] * size + position % size for position in at]
            spans.append(Span(row=row, length=length, context=chunk.start + length))
            row_of[chunk.key] = row
        rows: list[int] = []
        for chunk in plan.chunks:
            row, length = row_of[chunk.key], len(chunk.token_ids)
            if chunk.logits == "all":
                rows += range(row, row + length)
            elif chunk.logits == "last":
                rows.append(row + length - 1)
        width = max(len(chunk.block_table) for chunk in order)
        tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in order]
        batch = Batch(
            positions_T=self._tensor(positions),
            slots_T=self._tensor(slots),
            query_starts_S1=self._tensor([*(span.row for span in spans), len(tokens)], torch.int32),
            contexts_S=self._tensor([span.context for span in spans], torch.int32),
            tables_SN=self._tensor(tables, torch.int32),
            spans=tuple(spans),
            num_single=sum(span.length == 1 for span in spans),
            cache=self._cache,
        )
        return self._tensor(tokens), batch, self._tensor(rows)

    def _tensor(self, values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)
