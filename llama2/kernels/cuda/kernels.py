"""Owns the arithmetic on a GPU: our Triton kernels, and cuBLAS for products with more than a few rows.

A quantized weight is multiplied as it is, up to `quantized_products.MOST_ROWS` rows; for more its values are written
out first, in memory that all weights share.

Nothing here asks the device for a number, or takes one from `Batch.spans`: a pass can be recorded once and replayed
with other contents of the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llama2.adapters.products import LoraProduct
from llama2.batch import Batch
from llama2.kernels.cuda import decode_attention, pointwise, prefill_attention, products, quantized_products
from llama2.kernels.cuda.lora import add_lora
from llama2.kernels.cuda.quantized_weights import TILE, Quantized, arrange
from llama2.kernels.plain import PlainKernels
from llama2.machine.memory_plan import DEQUANTIZED_BYTES
from llama2.weights.formats import Weight

# Rows with which a product costs its weight's way through memory and nothing else.
STREAMED_ROWS = (1, 2)
# Sequences times key heads of a pass, far beyond what a KV cache holds; 4 bytes each.
MAX_SEQUENCE_HEADS = 1 << 20


class CudaKernels(PlainKernels):
    """See `llama2.kernels.Kernels`. For one device, and one stream at a time."""

    def __init__(self, device: torch.device, dtype: torch.dtype, *, hopper: bool = False) -> None:
        """`hopper`: of compute capability 9.0, which has warp-group products and programmatic dependent launch."""
        self._dtype = dtype
        self._wgmma = self._pdl = hopper
        self._arrived = torch.zeros(MAX_SEQUENCE_HEADS, dtype=torch.int32, device=device)
        # Values of quantized weights, for products with many rows; none where no weight is quantized.
        self._dequantized: torch.Tensor | None = None

    def prepare(self, weights: Mapping[str, Sequence[Weight]], *, threads: int) -> dict[str, Any]:
        prepared = super().prepare(weights, threads=threads)
        if self._dequantized is None and any(map(_has_codes, prepared.values())):
            self._dequantized = torch.empty(DEQUANTIZED_BYTES, dtype=torch.uint8, device=self._arrived.device)
        return prepared

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if isinstance(weight, tuple):
            return self._joined_linear(x, weight)
        if x.shape[0] in STREAMED_ROWS and isinstance(weight, torch.Tensor):
            return products.linear(x, weight, pdl=self._pdl)
        return super().linear(x, weight)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: LoraProduct, slots_T: torch.Tensor) -> torch.Tensor:
        return add_lora(y, x, lora, slots_T, pdl=self._pdl)

    def gated_linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if x.shape[0] in STREAMED_ROWS and isinstance(weight, torch.Tensor):
            return products.linear(x, weight, gated=True, pdl=self._pdl)
        if len(x) <= quantized_products.MOST_ROWS and _has_whole_halves(weight):
            out = x.new_empty(len(x), weight[0].outputs // 2)
            quantized_products.linear(x, weight[0], out, gated=True, pdl=self._pdl)
            return out
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

    def _prepare_one(self, weight: Weight) -> Any:
        return arrange(weight, self._dtype) or super()._prepare_one(weight)

    def _join(self, prepared: Sequence[Any]) -> Any:
        return tuple(piece for one in prepared for piece in (one if isinstance(one, tuple) else (one,)))

    def _joined_linear(self, x: torch.Tensor, weight: tuple[Any, ...]) -> torch.Tensor:
        """Each weight's product, one's outputs after the other's."""
        sizes = [piece.outputs if isinstance(piece, Quantized) else _num_outputs(piece) for piece in weight]
        out = x.new_empty(len(x), sum(sizes))
        for piece, own in zip(weight, out.split(sizes, dim=1), strict=True):
            if not isinstance(piece, Quantized):
                own.copy_(self.linear(x, piece))
            elif len(x) <= quantized_products.MOST_ROWS:
                quantized_products.linear(x, piece, own, pdl=self._pdl)
            else:
                self._dequantized_linear(x, piece, own)
        return out

    def _dequantized_linear(self, x: torch.Tensor, weight: Quantized, out: torch.Tensor) -> None:
        """By cuBLAS, as many outputs at a time as there is room for their values."""
        assert self._dequantized is not None
        values = self._dequantized.view(self._dtype)
        rows = max(TILE, len(values) // weight.inputs // TILE * TILE)
        for first in range(0, weight.outputs, rows):
            last = min(first + rows, weight.tiles * TILE)
            values_FC = values[: (last - first) * weight.inputs].view(-1, weight.inputs)
            quantized_products.dequantize(weight, first // TILE, values_FC, pdl=self._pdl)
            own = out[:, first:last]
            torch.mm(x, values_FC[: own.shape[1]].T, out=own)


def _num_outputs(piece: Any) -> int:
    return len(next(iter(piece.parts.values())) if isinstance(piece, Weight) else piece)


def _has_codes(weight: Any) -> bool:
    return isinstance(weight, tuple) and any(isinstance(piece, Quantized) for piece in weight)


def _has_whole_halves(weight: Any) -> bool:
    """Whether it is one quantized weight, and both halves of its outputs are whole tiles."""
    return _has_codes(weight) and len(weight) == 1 and weight[0].outputs % (2 * TILE) == 0
