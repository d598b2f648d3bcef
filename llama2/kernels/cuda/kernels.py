"""Owns the arithmetic on a GPU: our Triton kernels, and cuBLAS for products with more than a few rows.

Nothing here asks the device for a number, or takes one from `Batch.spans`: a pass can be recorded once and replayed
with other contents of the same tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from llama2.batch import Batch
from llama2.kernels.cuda import decode_attention, pointwise, prefill_attention, products
from llama2.kernels.plain import PlainKernels

# Rows with which a product costs its weight's way through memory and nothing else.
STREAMED_ROWS = (1, 2)
# Sequences times key heads of a pass, far beyond what a KV cache holds; 4 bytes each.
MAX_SEQUENCE_HEADS = 1 << 20


class CudaKernels(PlainKernels):
    """See `llama2.kernels.Kernels`. For one device, and one stream at a time."""

    def __init__(self, device: torch.device, *, hopper: bool = False) -> None:
        """`hopper`: of compute capability 9.0, which has warp-group products and programmatic dependent launch."""
        self._wgmma = self._pdl = hopper
        self._arrived = torch.zeros(MAX_SEQUENCE_HEADS, dtype=torch.int32, device=device)

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if x.shape[0] in STREAMED_ROWS and isinstance(weight, torch.Tensor):
            return products.linear(x, weight, pdl=self._pdl)
        return super().linear(x, weight)

    def gated_linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if x.shape[0] in STREAMED_ROWS and isinstance(weight, torch.Tensor):
            return products.linear(x, weight, gated=True, pdl=self._pdl)
        return super().gated_linear(x, weight)

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TC, pointwise.add_rms_norm(x_TC, branch_TC, weight_C, eps, pdl=self._pdl)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        keys, values, scales = batch.cache.keys[layer], batch.cache.values[layer], batch.cache.scales(layer)
        return pointwise.rotate_and_store(
            qkv_TX, rope_TD2, batch.slot_mapping_T, keys, values, scales=scales, pdl=self._pdl
        )

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        keys, values, single = batch.cache.keys[layer], batch.cache.values[layer], batch.num_single
        block_tables_SN, seq_lens_S, starts_S1 = batch.block_tables_SN, batch.seq_lens_S, batch.query_starts_S1
        scales, out_THD = batch.cache.scales(layer), torch.empty_like(q_THD)
        if single != 0:
            decode_attention.attend_decode(
                q_THD,
                keys,
                values,
                block_tables_SN[:single],
                seq_lens_S[:single],
                starts_S1 if single is None else starts_S1[: single + 1],
                self._arrived,
                out_THD,
                scales=scales,
                pdl=self._pdl,
            )
        if single is None or single < len(seq_lens_S):
            prefill_attention.attend_prefill(
                q_THD,
                keys,
                values,
                block_tables_SN[single:],
                seq_lens_S[single:],
                starts_S1[single:],
                single or 0,
                out_THD,
                scales=scales,
                wgmma=self._wgmma,
                pdl=self._pdl,
            )
        return out_THD

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return pointwise.silu_mul(gate_up_T2F, pdl=self._pdl)
