"""Owns the arithmetic in plain PyTorch: for any device and dtype, and what every other implementation must equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional

from llama2.adapters.products import LoraProduct
from llama2.batch import Batch
from llama2.weights.formats import Weight
from llama2.weights.formats.plain import Plain

if TYPE_CHECKING:
    from llama2.kernels import Layers
    from llama2.model import Layer


class PlainKernels:
    """See `llama2.kernels.Kernels`. Takes weights of every format: dequantizes for each product what is not plain."""

    def prepare(self, weights: Mapping[str, Sequence[Weight]], *, threads: int) -> dict[str, Any]:
        each = {(name, place): one for name, weight in weights.items() for place, one in enumerate(weight)}
        # The largest first: the last one may run on a single thread alone.
        order = sorted(each, key=lambda key: sum(part.nbytes for part in each[key].parts.values()), reverse=True)
        with ThreadPoolExecutor(threads) as pool:
            done = dict(zip(order, pool.map(lambda key: self._prepare_one(each[key]), order), strict=True))
        return {
            name: done[name, 0] if len(weight) == 1 else self._join([done[name, at] for at in range(len(weight))])
            for name, weight in weights.items()
        }

    def chain(self, layers: Sequence[Layer]) -> Layers:
        def run(x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            branch_TC: torch.Tensor | None = None
            for layer in layers:
                x_TC, branch_TC = layer(x_TC, branch_TC, rope_TD2, batch)
            assert branch_TC is not None
            return x_TC, branch_TC

        return run

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if isinstance(weight, tuple):
            return torch.cat([self.linear(x, one) for one in weight], dim=-1)
        return functional.linear(x, weight.dequantize().to(x.dtype) if isinstance(weight, Weight) else weight)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: LoraProduct, slots_T: torch.Tensor) -> torch.Tensor:
        for slot in slots_T[slots_T >= 0].unique().tolist():
            rows = (slots_T == slot).nonzero()[:, 0]
            shrunk_PTR = torch.matmul(x[rows].float(), lora.a_SPRC[slot].float().mT)
            columns_RF = lora.b_SRF[slot].float().split(lora.outputs, dim=1)
            added = []
            for part, (h_TR, b_RF) in enumerate(zip(shrunk_PTR, columns_RF, strict=True)):
                rank = int(lora.ranks_SP[slot, part])
                added.append(h_TR[:, :rank] * lora.scales_SP[slot, part] @ b_RF[:rank])
            y[rows] = (y[rows].float() + torch.cat(added, dim=1)).to(y.dtype)
        return y

    def gated_linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return self.silu_mul(self.linear(x, weight))

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if branch_TC is not None:
            x_TC = x_TC + branch_TC
        return x_TC, functional.rms_norm(x_TC, weight_C.shape, weight_C, eps)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        kv_heads, head_dim = batch.cache.keys[layer].shape[2:]
        heads_THD = qkv_TX.unflatten(-1, (-1, head_dim))
        q_THD, k_TKD, v_TKD = heads_THD.tensor_split((-2 * kv_heads, -kv_heads), dim=1)
        batch.cache.write(layer, _rotate(k_TKD, rope_TD2), v_TKD, batch.slot_mapping_T)
        return _rotate(q_THD, rope_TD2)

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        assert batch.spans, "a recorded pass needs kernels that ask the tensors alone"
        out_THD = torch.empty_like(q_THD)
        for sequence in range(len(batch.spans)):
            _attend_span(q_THD, batch, layer, sequence, out_THD)
        return out_THD

    def _prepare_one(self, weight: Weight) -> Any:
        return weight.dequantize() if isinstance(weight.format, Plain) else weight

    def _join(self, prepared: Sequence[Any]) -> Any:
        """What `linear` takes for weights whose outputs follow each other."""
        return tuple(prepared)

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
        return functional.silu(gate_TF) * up_TF


def _rotate(x_THD: torch.Tensor, rope_TD2: torch.Tensor) -> torch.Tensor:
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_TD2[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_THD)


def _attend_span(q_THD: torch.Tensor, batch: Batch, layer: int, sequence: int, out_THD: torch.Tensor) -> None:
    """Attention of one sequence's T newest positions over its L, by PyTorch's own kernel, into its rows of `out_THD`.

    A single query row takes the heads of a group as rows, so that a key head is read once for all of them and never
    repeated: on a CPU, SDPA's own `enable_gqa` takes a path several times slower. Over a cache of codes in fp32.
    """
    span, heads, kv_heads = batch.spans[sequence], q_THD.shape[1], batch.cache.keys[layer].shape[2]
    rows = slice(span.row, span.row + span.length)
    k_LKD, v_LKD = batch.cache.read(layer, batch.block_tables_SN[sequence], span.seq_len)
    k_K1LD, v_K1LD = k_LKD.transpose(0, 1)[:, None], v_LKD.transpose(0, 1)[:, None]
    q_KGTD = q_THD[rows].to(k_LKD.dtype).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    if span.length == 1:
        out_KGTD = functional.scaled_dot_product_attention(q_KGTD.transpose(1, 2), k_K1LD, v_K1LD).transpose(1, 2)
    else:
        group = (-1, heads // kv_heads, -1, -1)
        mask_TL = None
        if span.seq_len > span.length:
            mask_TL = torch.ones(span.length, span.seq_len, dtype=torch.bool, device=q_THD.device)
            mask_TL = mask_TL.tril(span.seq_len - span.length)
        out_KGTD = functional.scaled_dot_product_attention(
            q_KGTD, k_K1LD.expand(group), v_K1LD.expand(group), mask_TL, is_causal=mask_TL is None
        )
    out_THD[rows] = out_KGTD.permute(2, 0, 1, 3).flatten(1, 2)
