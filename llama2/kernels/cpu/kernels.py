"""Owns the arithmetic on a CPU: the C++ operators in cpu/ where they are faster, and plain PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from llama2.batch import Batch
from llama2.kernels.plain import PlainKernels

if TYPE_CHECKING:
    from llama2.model import TransformerBlock

# Of a weight that is not packed. Up to so many rows its way through memory is what counts; beyond, oneDNN's blocked
# products win.
MAX_STREAMED_ROWS = 64


class CpuKernels(PlainKernels):
    """See `llama2.kernels.Kernels`. `cpu_library.load_library` must have succeeded."""

    def __init__(self, dtype: torch.dtype) -> None:
        operators = torch.ops.llama2_cpu
        self._is_bf16 = dtype is torch.bfloat16
        self._packs = self._is_bf16 and operators.packs_weights()
        # `.default` spares a choice among overloads at every call.
        self._layers = operators.layers.default
        self._linear = operators.linear.default
        self._add_rms_norm = operators.add_rms_norm.default
        self._rotate_and_store = operators.rotate_and_store.default
        self._paged_attention = operators.paged_attention.default
        self._silu_mul = operators.silu_mul.default

    def prepare(self, weights: Iterable[torch.Tensor], *, threads: int) -> None:
        if not self._packs:
            return
        # The largest first: the last one may keep a single thread.
        largest_first = sorted(weights, key=torch.Tensor.numel, reverse=True)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(torch.ops.llama2_cpu.pack.default, largest_first))

    def _has_product(self, rows: int) -> bool:
        """Whether the operators make products of so many rows, and not F.linear."""
        return self._packs or (self._is_bf16 and rows <= MAX_STREAMED_ROWS)

    def run_layers(
        self, layers: Iterable[TransformerBlock], x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layers = list(layers)
        shared = layers[0].attention.wo.collectives.shared
        if shared is None or not self._has_product(x_TC.shape[0]):
            return super().run_layers(layers, x_TC, rope_TD2, batch)
        cache = batch.cache
        branch_TC = self._layers(
            x_TC,
            [weight for layer in layers for weight in _weights(layer)],
            layers[0].ffn_norm.eps,
            rope_TD2,
            batch.slots_T,
            cache.keys,
            cache.values,
            batch.tables_SN,
            batch.query_starts_S1,
            batch.contexts_S,
            *shared,
        )
        return x_TC, branch_TC

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._has_product(x.shape[0]):
            return self._linear(x, weight)
        return super().linear(x, weight)

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TC, self._add_rms_norm(x_TC, branch_TC, weight_C, eps)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        cache = batch.cache
        return self._rotate_and_store(qkv_TX, rope_TD2, batch.slots_T, cache.keys[layer], cache.values[layer])

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        cache = batch.cache
        return self._paged_attention(
            q_THD,
            cache.keys[layer],
            cache.values[layer],
            batch.tables_SN,
            batch.query_starts_S1,
            batch.contexts_S,
        )

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return self._silu_mul(gate_up_T2F)


def _weights(layer: TransformerBlock) -> tuple[torch.Tensor, ...]:
    """In the order in which the operator uses them."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return (
        layer.attention_norm.weight,
        attention.wqkv.weight,
        attention.wo.weight,
        layer.ffn_norm.weight,
        feed_forward.w13.weight,
        feed_forward.w2.weight,
    )
