"""Owns the choice of the arithmetic: `Kernels` is what the model calls, with one implementation per device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llama2.adapters.products import LoraProduct
from llama2.batch import Batch
from llama2.errors import InvalidValue
from llama2.weights.formats import Weight

if TYPE_CHECKING:
    from llama2.model import Layer

# All layers in turn: from x (T, C), the rotary table's rows (T, D / 2, 2) and the batch to the x and the branch of the
# last layer. May overwrite x.
Layers = Callable[[torch.Tensor, torch.Tensor, Batch], tuple[torch.Tensor, torch.Tensor]]


class Kernels(Protocol):
    """The steps of a layer. Shape suffixes as in llama2/model.py; X = (H + 2 K) D.

    `llama2.kernels.plain` is the reference: every other implementation equals it up to the rounding of the dtype.
    """

    def prepare(self, weights: Mapping[str, Sequence[Weight]], *, threads: int) -> dict[str, Any]:
        """Weights (F, C) of linear layers as `linear` and `gated_linear` of the same kernels take them, by name.

        Several of one name are one weight, whose formats differ: its outputs are one's after the other's.

        To be called once, by `threads` threads in all, when the weights have their values. May lay them out anew in the
        same memory: from then on nothing else may look into them.
        """

    def chain(self, layers: Sequence[Layer]) -> Layers:
        """All layers as one function: `x, branch = layer(x, branch, rope, batch)` for each, from no branch on.

        As the model writes a layer, by the functions below, or all of them as one operator.
        """

    def linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """x (T, C) times a prepared weight (F, C), transposed: (T, F)."""

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, lora: LoraProduct, slots_T: torch.Tensor) -> torch.Tensor:
        """y (T, F), the product of x (T, C), and what the adapter in each row's slot adds to it. May overwrite y.

        slots_T (int32) is -1 where a row has none: its y stays as it is. Added in fp32, and rounded once.
        """

    def gated_linear(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        """x (T, C) times a prepared weight (2 F, C), transposed: silu of the first half, times the second: (T, F)."""

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        """The second step of `gated_linear` alone."""

    def add_rms_norm(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, weight_C: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + branch, in the dtype of x, and its RMS norm times the weight. May overwrite x."""

    def rotate_and_store(self, qkv_TX: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        """Rotate queries and keys by their positions, store keys and values in the cache; returns queries (T, H, D).

        Each pair of neighbouring features (2i, 2i + 1) is turned by its angle, in fp32, as Meta's code does.
        """

    def attend(self, q_THD: torch.Tensor, batch: Batch, layer: int) -> torch.Tensor:
        """Attend causally over each sequence's own positions in the cache; returns (T, H, D).

        H query heads share K key heads in groups of H / K, in order.
        """


def is_hopper(device: torch.device) -> bool:
    """Of compute capability 9.0: H100, H200 and their kin."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def choose_kernels(device: torch.device, dtype: torch.dtype, activation_dtype: str = "auto") -> Kernels:
    """The fastest arithmetic for models of `dtype` on `device`; the first call on a machine may compile it.

    `activation_dtype` is what quantized weights are multiplied by: "auto" is `dtype`, "int8" rounds it.

    Raises:
        InvalidValue: it is int8, which only the operators on a CPU have, for models of bf16.
    """
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float32):
        from llama2.kernels.cpu.kernels import CpuKernels
        from llama2.kernels.cpu.library import load_library

        if load_library() and (activation_dtype == "auto" or dtype == torch.bfloat16):
            return CpuKernels(dtype, activation_dtype)
    if activation_dtype != "auto":
        raise InvalidValue(
            "activation_dtype",
            f"{activation_dtype} is for models of bfloat16 on a CPU with a C++ compiler: this one is of "
            f"{str(dtype).removeprefix('torch.')} on {device.type}; leave it out or set it to auto",
        )
    if device.type == "cuda":
        from llama2.kernels.cuda.kernels import CudaKernels

        return CudaKernels(device, dtype, hopper=is_hopper(device))
    from llama2.kernels.plain import PlainKernels

    return PlainKernels()
