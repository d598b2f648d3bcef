"""Owns one forward pass: from a plan through the model to the logits asked for, replayed or launched.

Knows no requests: every plan is self-contained, so a rank keeps nothing between plans but KV cache and adapters.
"""

from __future__ import annotations

from array import array
from contextlib import nullcontext
from itertools import islice

import torch

from llama2.adapters.reference import AdapterRef
from llama2.adapters.store import AdapterStore
from llama2.batch import Batch, Span
from llama2.config import EngineConfig
from llama2.engine.graphs import PassGraphs, choose_record
from llama2.engine.inputs import Inputs, Sizes, host_inputs
from llama2.engine.scheduler import Chunk, Plan
from llama2.engine.token_pool import TokenPool
from llama2.kv_cache import KVCache
from llama2.model import Transformer


class Runner:
    """Runs plans on this rank. Every rank must have one and run the same plans in the same order."""

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        device: torch.device,
        config: EngineConfig,
        adapters: AdapterStore | None = None,
    ) -> None:
        """On a GPU, records passes unless `config` says otherwise, and runs one of the largest size.

        Plans with adapters need the store that these are in.
        """
        self._model = model
        self._cache = cache
        self._device = device
        self._adapters = adapters
        self._pool = TokenPool(config.max_batch_size, model.collectives, device)
        self._graphs: PassGraphs | None = None
        with self._on_device():
            record = choose_record(device) if config.cuda_graphs else None
            if record is not None:
                layers = None if adapters is None else adapters.layers
                self._graphs = PassGraphs(model, cache, self._pool, device, config, record, layers)
        if device.type == "cuda":
            self.warm_up(config)

    @torch.inference_mode()
    def warm_up(self, config: EngineConfig) -> None:
        """Run a pass of the largest size, on blocks that no sequence has yet.

        So no request has to wait for kernels to compile and load.
        """
        free = iter(range(self._cache.num_blocks))
        chunks: list[Chunk] = []
        left = config.max_step_tokens
        # With several sequences the first one decodes and the others have prompts, so that every kernel runs.
        decoding = min(1, config.max_batch_size - 1)
        for length in (*[1] * decoding, *[config.max_seq_len] * (config.max_batch_size - decoding)):
            length = min(length, left)
            blocks = array("i", islice(free, -(-length // self._cache.block_size)))
            if not blocks or len(blocks) * self._cache.block_size < length:
                break
            chunks.append(Chunk(len(chunks), 0, (0,) * length, blocks, "last"))
            left -= length
        with self._on_device():
            self._launch(Plan(chunks=tuple(chunks)))

    def close(self) -> None:
        """Free what was recorded, which must precede the end of the process group. All ranks call it."""
        if self._graphs is not None:
            self._graphs.close()
            self._graphs = None
        if self._adapters is not None:
            self._adapters.close()

    @torch.inference_mode()
    def keep(self, places: list[int], ids_R: torch.Tensor) -> None:
        """Rank 0: put ids (R,), int64, into these places of the token pool, for the next plan's unread tokens."""
        self._pool.put(places, ids_R)

    @torch.inference_mode()
    def run(self, plan: Plan) -> torch.Tensor | None:
        """Compute a plan. On rank 0: fp32 logits (R, V), the rows that the chunks ask for, in their order.

        They must be read before the next plan runs.
        """
        with self._on_device():
            self._cache.copy(plan.copies)
            for slot, ref in plan.puts:
                self._store.put(slot, ref)
            if plan.has_unread:
                self._pool.share()
            if self._graphs is not None and self._graphs.takes(plan):
                return self._graphs.run(plan)
            return self._launch(plan)

    def load_adapter(self, ref: AdapterRef) -> None:
        """Begin to read it, while plans run; see `AdapterStore.load`."""
        self._store.load(ref)

    def has_read_adapter(self) -> bool:
        """Would `finish_adapter` wait for no rank?"""
        here = torch.tensor([float(self._store.has_read)], device=self._device)
        return int(self._model.collectives.all_reduce(here)) == self._model.collectives.world_size

    def finish_adapter(self) -> tuple[bytes, str]:
        """See `AdapterStore.finish`."""
        with self._on_device():
            return self._store.finish()

    def drop_adapter(self, ref: AdapterRef) -> None:
        """Forget it: no plan will name it before it is loaded again."""
        self._store.drop(ref)

    @property
    def _store(self) -> AdapterStore:
        assert self._adapters is not None, "this runner has no adapters"
        return self._adapters

    def _launch(self, plan: Plan) -> torch.Tensor | None:
        inputs, batch = self._inputs(plan)
        tokens_T = self._pool.gather(inputs) if plan.has_unread else inputs.ids_T
        return self._model(tokens_T, batch, inputs.rows_R)

    def _on_device(self) -> torch.cuda.device | nullcontext[None]:
        """Selects this rank's GPU: a new thread starts on GPU 0."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def _inputs(self, plan: Plan) -> tuple[Inputs, Batch]:
        # A stable sort: sequences with one token first, otherwise in the plan's order, which the logits keep.
        order = sorted(plan.chunks, key=lambda chunk: chunk.length > 1)
        spans: list[Span] = []
        row_of: dict[int, int] = {}
        row = 0
        for chunk in order:
            spans.append(Span(row=row, length=chunk.length, seq_len=chunk.end))
            row_of[chunk.key] = row
            row += chunk.length
        rows: list[int] = []
        for chunk in plan.chunks:
            end = row_of[chunk.key] + chunk.length
            rows += range(end - chunk.num_logits, end)
        blocks = max(len(chunk.block_table) for chunk in order)
        sizes = Sizes(tokens=row, sequences=len(order), rows=len(rows), blocks=blocks)
        inputs = host_inputs(sizes, self._device)
        inputs.fill(order, rows, self._cache)
        if self._device.type != "cpu":
            inputs = Inputs(sizes, self._device).copy_(inputs)
        single, adapters = sum(span.length == 1 for span in spans), None
        if any(chunk.slot >= 0 for chunk in plan.chunks):
            adapters = self._store.layers
        return inputs, inputs.batch(tuple(spans), single, self._cache, adapters)
