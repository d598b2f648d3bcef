"""Owns the arithmetic on a CPU: the C++ operators in cpu/ where they are faster, and plain PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llama2.adapters.products import PRODUCTS, BatchAdapters, LoraProduct
from llama2.batch import Batch
from llama2.kernels.plain import PlainKernels
from llama2.weights.formats import Format, Weight
from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.formats.plain import Plain
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8

if TYPE_CHECKING:
    from llama2.kernels import Layers
    from llama2.model import Layer


_SMALLEST_GROUP = 16  # kSmallestStep of quantized_linear.cpp


class CpuKernels(PlainKernels):
    """See `llama2.kernels.Kernels`. `library.load_library` must have succeeded."""

    def __init__(self, dtype: torch.dtype, activation_dtype: str = "auto") -> None:
        """`activation_dtype` "int8": products with quantized weights round their inputs to int8, see `int8_codes.h`."""
        self._dtype = dtype
        self._rounds = activation_dtype == "int8"
        operators = torch.ops.llama2_cpu
        # `.default` skips overload resolution at every call.
        self._add_rms_norm = operators.add_rms_norm.default
        self._rotate_and_store = operators.rotate_and_store.default
        self._paged_attention = operators.paged_attention.default
        self._silu_mul = operators.silu_mul.default
        self._add_lora = operators.add_lora.default

    def chain(self, layers: Sequence[Layer]) -> Layers:
        one_by_one, shared = super().chain(layers), layers[0].collectives.shared
        linears = [linear for layer in layers for linear in (layer.wqkv, layer.wo, layer.w13, layer.w2)]
        if shared is None or not all(map(_is_linear, linears)):
            return one_by_one
        norms = [norm for layer in layers for norm in (layer.attention_norm, layer.ffn_norm)]
        at_once = torch.ops.llama2_cpu.make_layers(norms, linears, layers[0].eps, *shared)
        run_at_once, max_rows, lora_of = at_once.run, at_once.max_rows(), _PreparedLora()

        def run(x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            if x_TC.shape[0] > max_rows:
                return one_by_one(x_TC, rope_TD2, batch)
            branch_TC = run_at_once(
                x_TC,
                rope_TD2,
                batch.slot_mapping_T,
                batch.cache.keys,
                batch.cache.values,
                batch.block_tables_SN,
                batch.query_starts_S1,
                batch.seq_lens_S,
                batch.cache.key_scales,
                batch.cache.value_scales,
                *lora_of(batch.adapters),
            )
            return x_TC, branch_TC

        return run

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        return weight.product(x) if _is_linear(weight) else super().linear(x, weight)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: LoraProduct, slots_T: torch.Tensor) -> torch.Tensor:
        self._add_lora(y, x, lora.a_SPRC, lora.b_SRF, lora.ranks_SP, lora.scales_SP, lora.outputs, slots_T)
        return y

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return x_TC, self._add_rms_norm(x_TC, branch_TC, weight_C, eps)

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        cache = batch.cache
        return self._rotate_and_store(
            qkv_TX, rope_TD2, batch.slot_mapping_T, cache.keys[layer], cache.values[layer], *cache.scales(layer)
        )

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        cache = batch.cache
        return self._paged_attention(
            q_THD,
            cache.keys[layer],
            cache.values[layer],
            batch.block_tables_SN,
            batch.query_starts_S1,
            batch.seq_lens_S,
            *cache.scales(layer),
        )

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        return self._silu_mul(gate_up_T2F)

    def _prepare_one(self, weight: Weight) -> Any:
        if weight.format == Plain(torch.bfloat16):
            return torch.ops.llama2_cpu.prepare_bf16(weight.parts["weight"])
        if self._dtype == torch.bfloat16 and _has_product(weight):
            parts = {name: part.view(len(part), -1) for name, part in weight.parts.items()}
            super_scales = parts.get("super_scales", parts.get("output_scales"))
            others = (parts.get("zeros"), parts.get("mins"), super_scales, parts.get("super_mins"))
            return torch.ops.llama2_cpu.prepare_quantized(
                parts["codes"], parts["scales"], *others, _table(weight.format), self._rounds
            )
        return super()._prepare_one(weight)

    def _join(self, prepared: Sequence[Any]) -> Any:
        if all(map(_is_linear, prepared)):
            return torch.ops.llama2_cpu.join(prepared)
        return super()._join(prepared)


class _PreparedLora:
    """What the operator of all layers takes of a batch's adapters: made when their memory is another one, not in each
    step.
    """

    def __init__(self) -> None:
        self._layers: Sequence[Mapping[str, LoraProduct]] | None = None
        self._lora: Any = None

    def __call__(self, adapters: BatchAdapters | None) -> tuple[Any, torch.Tensor | None]:
        if adapters is None:
            return None, None
        if adapters.layers is not self._layers:
            products = [layer[name] for layer in adapters.layers for name in PRODUCTS]
            self._lora = torch.ops.llama2_cpu.make_lora(
                [each.a_SPRC for each in products],
                [each.b_SRF for each in products],
                [each.ranks_SP for each in products],
                [each.scales_SP for each in products],
                [each.outputs for each in products],
            )
            self._layers = adapters.layers
        return self._lora, adapters.slots_T


def _has_product(weight: Weight) -> bool:
    """Whether the operators multiply by a quantized `weight`: not where its groups are very small."""
    if isinstance(weight.format, Plain):
        return False
    codes = weight.parts["codes"]
    inputs = codes.shape[1] * (1 if codes.dtype == torch.int8 else 2)
    groups = (part.numel() // len(part) for name, part in weight.parts.items() if name != "codes")
    return all(inputs % (_SMALLEST_GROUP * group) == 0 for group in groups)


def _table(format: Format) -> list[float]:
    """The values of the codes 0 to 15; none for codes of 8 bits."""
    if isinstance(format, Q8):
        return []
    if isinstance(format, Lut4):
        return list(TABLES[format.table])
    zero = format.zero or 0 if isinstance(format, Q4) else 0
    return [float(code - zero) for code in range(16)]


def _is_linear(weight: Any) -> bool:
    """Whether the operators prepared `weight`. Plain PyTorch takes other formats."""
    return isinstance(weight, torch.ScriptObject)
