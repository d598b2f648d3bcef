"""Owns the arithmetic on a GPU: our Triton kernels, and cuBLAS for products with more than a few rows.

Nothing here asks the device for a number, or takes one from `Batch.spans`: a pass in which every sequence brings one
token can be recorded once and replayed with other contents of the same tensors.
"""

from __future__ import annotations

import torch

from llama2.batch import Batch
from llama2.kernels import triton_attention, triton_layers
from llama2.kernels.plain import PlainKernels

# Rows with which a product costs its weight's way through memory and nothing else; Triton's tiles are powers of 2.
STREAMED_ROWS = (1, 2)


class CudaKernels(PlainKernels):
    """See `llama2.kernels.Kernels`."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.shape[0] in STREAMED_ROWS:
            return triton_layers.linear(x, weight)
        return super().linear(x, weight)

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TC, triton_layers.add_rms_norm(x_TC, branch_TC, weight_C, eps)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        cache = batch.cache
        return triton_layers.rotate_and_store(qkv_TX, rope_TD2, batch.slots_T, cache.keys[layer], cache.values[layer])

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        keys, values, single = batch.cache.keys[layer], batch.cache.values[layer], batch.num_single
        if single == len(q_THD):
            return triton_attention.attend_single(q_THD, keys, values, batch.tables_SN, batch.contexts_S)
        out_THD = torch.empty_like(q_THD)
        if single:
            tables_SN, contexts_S = batch.tables_SN[:single], batch.contexts_S[:single]
            out_THD[:single] = triton_attention.attend_single(q_THD[:single], keys, values, tables_SN, contexts_S)
        triton_attention.attend_ragged(
            q_THD,
            keys,
            values,
            batch.tables_SN[single:],
            batch.contexts_S[single:],
            batch.query_starts_S1[single:],
            single,
            out_THD,
        )
        return out_THD

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return triton_layers.silu_mul(gate_up_T2F)
