"""Owns the arithmetic of a training pass: the steps of a layer as functions with gradients, over frozen weights.

Knows no optimizer and no data. A pass has whole sequences, one after the other without padding, and needs no cache: its
keys and values live from `rotate_and_store` to `attend`.

Gradients are for the adapters alone, so what a backward pass needs of a product is its weight, which is read, and
dequantized, again. Shape suffixes as in llama2/model.py; P parts of a product, R adapter ranks, X outputs of qkv.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as functional
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from llama2.batch import Batch
from llama2.kernels.plain import PlainKernels
from llama2.parallel.collectives import Collectives
from llama2.training.collectives import sum_gradients
from llama2.training.lora import TrainedProduct
from llama2.weights.formats import Weight

if TYPE_CHECKING:
    from llama2.kernels import Layers
    from llama2.model import Layer

# Values of a quantized weight that are dequantized at once: formats need several times their memory for it.
DEQUANTIZED_VALUES = 4 << 20


class TrainingKernels(PlainKernels):
    """See `llama2.kernels.Kernels`. `batch.adapters.layers` has `TrainedProduct`s.

    Parallel ranks sum what they add to the residual stream, as always, and on the way back what each of them needs the
    gradient of: the inputs of products whose outputs are cut.
    """

    def __init__(self, collectives: Collectives, *, checkpointing: bool) -> None:
        """`checkpointing`: of each layer only its input is kept, and the layer is computed again on the way back."""
        self._collectives = collectives
        self._checkpointing = checkpointing
        self._keys_and_values: tuple[torch.Tensor, torch.Tensor] | None = None
        # Seeds the dropout of the next pass; None: no dropout.
        self.dropout_seed: int | None = None

    def chain(self, layers: Sequence[Layer]) -> Layers:
        def run(x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            branch_TC: torch.Tensor | None = None
            for layer in layers:
                # Summed here, so that one tensor for each layer is kept and not two.
                x_TC = x_TC if branch_TC is None else x_TC + branch_TC
                if self._checkpointing and torch.is_grad_enabled():
                    x_TC, branch_TC = checkpoint(
                        *(layer, x_TC, None, rope_TD2, batch), use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    x_TC, branch_TC = layer(x_TC, None, rope_TD2, batch)
            assert branch_TC is not None
            return x_TC, branch_TC

        return run

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        if isinstance(weight, tuple):
            return torch.cat([self.linear(x, one) for one in weight], dim=-1)
        return _FrozenLinear.apply(x, weight)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: Any, slots_T: torch.Tensor) -> torch.Tensor:
        """`lora` is a `TrainedProduct`, which is for all rows."""
        assert isinstance(lora, TrainedProduct)
        if lora.a is None:
            return y
        if self.dropout_seed is not None and lora.dropout > 0:
            x = x * lora.kept(self.dropout_seed, x)
        return _AddLora.apply(y, x, lora, lora.a, *lora.b)

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if branch_TC is not None:
            x_TC = x_TC + branch_TC
        return x_TC, sum_gradients(_RmsNorm.apply(x_TC, weight_C, eps), self._collectives)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        kv_heads, head_dim = batch.cache.keys[layer].shape[2:]
        heads_THD = qkv_TX.unflatten(-1, (-1, head_dim))
        qk_THD, v_TKD = heads_THD.tensor_split((-kv_heads,), dim=1)
        q_THD, k_TKD = _Rotate.apply(qk_THD, rope_TD2).tensor_split((-kv_heads,), dim=1)
        self._keys_and_values = k_TKD, v_TKD
        return q_THD

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        assert self._keys_and_values is not None
        k_TKD, v_TKD = self._keys_and_values
        self._keys_and_values = None
        lengths = [span.length for span in batch.spans]
        each = zip(*(x.split(lengths) for x in (q_THD, k_TKD, v_TKD)), strict=True)
        return torch.cat([_attend(*sequence) for sequence in each])

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return _SiluMul.apply(gate_up_T2F)


def values_of(weight: Any, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """The values (F, C) of a prepared weight with so many inputs, a few outputs dequantized at a time."""
    if not isinstance(weight, Weight):
        return weight
    first = next(iter(weight.parts.values()))
    values_FC = torch.empty(len(first), inputs, dtype=dtype, device=first.device)
    step = max(1, DEQUANTIZED_VALUES // inputs)
    for start in range(0, len(first), step):
        parts = {name: part[start : start + step] for name, part in weight.parts.items()}
        values_FC[start : start + step] = weight.format.dequantize(parts)
    return values_FC


class _FrozenLinear(torch.autograd.Function):
    """x (T, C) times a weight (F, C), transposed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight, ctx.inputs = weight, x.shape[-1]
        return functional.linear(x, values_of(weight, x.shape[-1], x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return dy @ values_of(ctx.weight, ctx.inputs, dy.dtype), None


class _AddLora(torch.autograd.Function):
    """To each part of y (T, F), in place, its scaling times x (T, C) times A (R, C), times B (F, R), transposed.

    A and B are fp32; the products are of the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, lora: TrainedProduct, a: torch.Tensor, *b: torch.Tensor
    ) -> torch.Tensor:
        a = a.to(x.dtype)
        b = tuple(part.to(x.dtype) for part in b)
        h = x @ a.T
        for h_TR, b_FR, columns, scaling in zip(h.split(lora.ranks, 1), b, lora.columns, lora.scalings, strict=True):
            y[:, columns].addmm_(h_TR, b_FR.T, alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, a, *b)
        ctx.lora = lora
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        x, h, a, *b = ctx.saved_tensors
        lora: TrainedProduct = ctx.lora
        parts = [dy[:, columns] for columns in lora.columns]
        dh = torch.cat(
            [scaling * (part @ b_FR) for part, b_FR, scaling in zip(parts, b, lora.scalings, strict=True)], dim=1
        )
        db = [
            (part.T @ h_TR).float().mul_(scaling)
            for part, h_TR, scaling in zip(parts, h.split(lora.ranks, 1), lora.scalings, strict=True)
        ]
        dx = dh @ a if ctx.needs_input_grad[1] else None
        return dy, dx, None, (dh.T @ x).float(), *db


class _RmsNorm(torch.autograd.Function):
    """x (T, C) over its root mean square, times a weight (C,)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        return functional.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x = x.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
        d = dy.float() * ctx.weight
        x = x * inverse
        d -= x * (x * d).mean(-1, keepdim=True)
        return d.mul_(inverse).to(dy.dtype), None, None


class _Rotate(torch.autograd.Function):
    """Each pair of neighbouring features (2i, 2i + 1) turned by its angle; back by the same angle."""

    @staticmethod
    def forward(ctx: Any, x_THD: torch.Tensor, rope_TD2: torch.Tensor) -> torch.Tensor:
        ctx.rope = rope_TD2
        return _rotate(x_THD, *rope_TD2[:, None].unbind(-1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_THD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.rope[:, None].unbind(-1)
        return _rotate(d_THD, cos, -sin), None


class _SiluMul(torch.autograd.Function):
    """silu of the first half of the features times the second."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d = torch.empty_like(gate_up)
        d_gate, d_up = d.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), dy, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dy * up, gate, grad_input=d_gate)
        return d


def _rotate(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x_THD.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    to_even, to_odd = turned.unflatten(-1, (-1, 2)).unbind(-1)
    even, odd = even.float(), odd.float()
    to_even.copy_(even * cos - odd * sin)
    to_odd.copy_(even * sin + odd * cos)
    return turned


def _attend(q_THD: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor) -> torch.Tensor:
    """Causal attention of one sequence over itself, (T, H, D)."""
    kv_heads = k_TKD.shape[1]
    q_KGTD = q_THD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k_KGTD, v_KGTD = (x.transpose(0, 1)[:, None].expand(-1, q_KGTD.shape[1], -1, -1) for x in (k_TKD, v_TKD))
    out_KGTD = functional.scaled_dot_product_attention(q_KGTD, k_KGTD, v_KGTD, is_causal=True)
    return out_KGTD.permute(2, 0, 1, 3).flatten(1, 2)
