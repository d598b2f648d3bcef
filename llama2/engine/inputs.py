"""Owns the layout of one step's inputs: from a plan's ids and block tables to the tensors of a `Batch`, in one copy.

A step's numbers share one buffer, which is filled on the host and copied to the device at once; the tensors are views
of it. Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from llama2.adapters.products import BatchAdapters, LoraProduct
from llama2.batch import Batch, Span
from llama2.engine.scheduler import Chunk
from llama2.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of one step: T tokens, S sequences, R rows whose logits are wanted, and N blocks of the longest block table."""

    tokens: int
    sequences: int
    rows: int
    blocks: int


class Inputs:
    """The tensors of one step, named and typed as in `Batch`, plus the ids and the rows in int64.

    adapter_slots_T is `BatchAdapters.slots_T`. sources_T (int64) says where each token's id is: in ids_T, or, from T
    on, in the token pool (`TokenPool.gather`).
    """

    def __init__(self, sizes: Sizes, device: torch.device, *, pinned: bool = False) -> None:
        wide = (*[sizes.tokens] * 4, sizes.rows)
        narrow = (sizes.sequences + 1, sizes.sequences, sizes.sequences * sizes.blocks, sizes.tokens)
        self.sizes = sizes
        self._buffer = torch.empty(8 * sum(wide) + 4 * sum(narrow), dtype=torch.uint8, device=device, pin_memory=pinned)
        wide_bytes, narrow_bytes = self._buffer.split((8 * sum(wide), 4 * sum(narrow)))
        self.ids_T, self.sources_T, self.positions_T, self.slot_mapping_T, self.rows_R = wide_bytes.view(
            torch.int64
        ).split(wide)
        self.query_starts_S1, self.seq_lens_S, tables, self.adapter_slots_T = narrow_bytes.view(torch.int32).split(
            narrow
        )
        self.block_tables_SN = tables.view(sizes.sequences, sizes.blocks)

    def fill(self, chunks: Items[Chunk], rows: Items[int], cache: KVCache) -> None:
        """Write the inputs of `chunks`, in order, and the rows whose logits are wanted; on the host.

        Unused space is padded with tokens of no sequence, which write into the cache's scratch block, sequences
        without a token, and rows that nobody reads.
        """
        block_size = cache.block_size
        lengths_S = np.array([chunk.length for chunk in chunks], dtype=np.int64)
        firsts_S = np.array([chunk.start for chunk in chunks], dtype=np.int64)
        ends_S = lengths_S.cumsum()
        sequence_T = np.arange(len(chunks)).repeat(lengths_S)
        tokens = len(sequence_T)
        positions_T = np.arange(tokens) + (firsts_S - ends_S + lengths_S)[sequence_T]
        block_tables_SN = self.block_tables_SN.numpy()
        block_tables_SN[:] = 0
        for table_N, chunk in zip(block_tables_SN, chunks, strict=False):
            table_N[: len(chunk.block_table)] = chunk.block_table
        blocks_T = block_tables_SN[sequence_T, positions_T // block_size].astype(np.int64)
        ids_T = list(chain.from_iterable((*chunk.token_ids, *[0] * len(chunk.unread)) for chunk in chunks))
        sources_T = np.arange(self.sizes.tokens)
        for chunk, end in zip(chunks, ends_S, strict=True):
            for position, place in enumerate(chunk.unread, start=end - len(chunk.unread)):
                sources_T[position] = self.sizes.tokens + place
        _write(self.ids_T, ids_T, 0)
        self.sources_T.numpy()[:] = sources_T
        _write(self.positions_T, positions_T, 0)
        _write(self.slot_mapping_T, blocks_T * block_size + positions_T % block_size, cache.scratch_block * block_size)
        _write(self.rows_R, rows, 0)
        _write(self.query_starts_S1, [0, *ends_S], tokens)
        _write(self.seq_lens_S, firsts_S + lengths_S, 0)
        slots_S = np.array([chunk.slot for chunk in chunks], dtype=np.int32)
        _write(self.adapter_slots_T, slots_S.repeat(lengths_S), -1)

    def copy_(self, host: Inputs) -> Inputs:
        """Copy the contents of inputs of the same sizes; from pinned memory, without waiting."""
        assert host.sizes == self.sizes
        self._buffer.copy_(host._buffer, non_blocking=True)
        return self

    def batch(
        self,
        spans: tuple[Span, ...],
        num_single: int | None,
        cache: KVCache,
        adapters: Items[Mapping[str, LoraProduct]] | None = None,
    ) -> Batch:
        """`adapters` are those of all slots, as in `BatchAdapters`; None for a pass without."""
        return Batch(
            positions_T=self.positions_T,
            slot_mapping_T=self.slot_mapping_T,
            query_starts_S1=self.query_starts_S1,
            seq_lens_S=self.seq_lens_S,
            block_tables_SN=self.block_tables_SN,
            spans=spans,
            num_single=num_single,
            cache=cache,
            adapters=None if adapters is None else BatchAdapters(slots_T=self.adapter_slots_T, layers=adapters),
        )


def _write(to: torch.Tensor, values: Items[int] | np.ndarray, filler: int) -> None:
    array = to.numpy()
    array[: len(values)] = values
    array[len(values) :] = filler


def host_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    """Inputs to fill and then copy to `device`.

    For a GPU they are in pinned memory, which torch reuses only once the copies from it are done: a rank that reads no
    token may be several steps ahead of its GPU.
    """
    return Inputs(sizes, torch.device("cpu"), pinned=device.type == "cuda")
