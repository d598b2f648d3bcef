"""Owns one pass over samples: their layout as a batch without padding, and the losses of the tokens that count.

Knows no optimizer and no order of samples. Shape suffixes as in llama2/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from llama2.adapters.products import BatchAdapters
from llama2.batch import Batch, Span
from llama2.kv_cache import KVCache
from llama2.model import Transformer
from llama2.training.data import Sample
from llama2.training.kernels import TrainingKernels
from llama2.training.lora import TrainedAdapter
from llama2.training.loss import cross_entropy


class Passes:
    """Runs samples through a model that was built with `TrainingKernels`. All ranks make the same calls."""

    def __init__(self, model: Transformer, adapter: TrainedAdapter, *, n_kv_heads: int) -> None:
        """`n_kv_heads` is the number that this rank holds."""
        assert isinstance(model.kernels, TrainingKernels)
        self._model, self._kernels = model, model.kernels
        layers: Any = adapter.layers  # the adapters that these kernels take
        empty = torch.empty(0, dtype=torch.int32, device=model.device)
        self._adapters = BatchAdapters(slots_T=empty, layers=layers)
        # A pass reads no key or value of another one.
        self._cache = KVCache(
            model.args, num_blocks=0, block_size=1, n_kv_heads=n_kv_heads, dtype=model.dtype, device=model.device
        )

    def losses(self, samples: Sequence[Sample], *, dropout_seed: int | None = None) -> torch.Tensor:
        """-ln p of each token that counts, in nats, fp32 (R,), in order. Without a seed there is no dropout."""
        self._kernels.dropout_seed = dropout_seed
        # Of its last token a sample has nothing to learn.
        lengths = [len(sample) - 1 for sample in samples]
        starts = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        ids = list(chain.from_iterable(sample.ids[:-1] for sample in samples))
        positions = list(chain.from_iterable(map(range, lengths)))
        learned = [
            (start + place - 1, sample.ids[place])
            for start, sample in zip(starts, samples, strict=False)
            for place in range(1, len(sample))
            if sample.counts[place]
        ]
        rows, targets = zip(*learned, strict=True)
        batch = Batch(
            positions_T=self._tensor(positions),
            slot_mapping_T=self._tensor([]),
            query_starts_S1=self._tensor(starts).int(),
            seq_lens_S=self._tensor(lengths).int(),
            block_tables_SN=self._tensor([]).int(),
            spans=tuple(
                Span(row=start, length=length, seq_len=length) for start, length in zip(starts, lengths, strict=False)
            ),
            num_single=0,
            cache=self._cache,
            adapters=self._adapters,
        )
        x_RC = self._model.features(self._tensor(ids), batch, self._tensor(rows))
        return cross_entropy(self._model, x_RC, self._tensor(targets))

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)
