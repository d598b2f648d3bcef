"""Owns the choice of the arithmetic: `Kernels` is what the model calls, with one implementation per device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch

from llama2.batch import Batch

if TYPE_CHECKING:
    from llama2.model import TransformerBlock


class Kernels(Protocol):
    """The steps of a layer. Shape suffixes as in llama2/model.py; X = (H + 2 K) D.

    `llama2.kernels.plain` is the reference: every other implementation equals it up to the rounding of the dtype.
    """

    def prepare(self, weights: Iterable[torch.Tensor], *, threads: int) -> None:
        """Lay out the weights (F, C) of linear layers as `linear` and `gated_linear` read them, in the same memory.

        To be called once, by `threads` threads in all, when the weights have their values and before any product.
        From then on nothing else may look into them.
        """

    def run_layers(
        self, layers: Iterable[TransformerBlock], x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each layer's `x, branch = layer(x, branch, rope, batch)`, from no branch to the last one's.

        As the model writes a layer, by the functions below, or all of them as one operator. May overwrite x.
        """

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (T, C) times weight (F, C), transposed: (T, F)."""

    def gated_linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x (T, C) times weight (2 F, C), transposed: silu of the first half, times the second: (T, F)."""

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


def choose_kernels(device: torch.device, dtype: torch.dtype) -> Kernels:
    """The fastest arithmetic for models of `dtype` on `device`; the first call on a machine may compile it."""
    if device.type == "cpu":
        from llama2.kernels.cpu.kernels import CpuKernels
        from llama2.kernels.cpu.library import load_library

        if load_library():
            return CpuKernels(dtype)
    if device.type == "cuda":
        from llama2.kernels.cuda.kernels import CudaKernels

        return CudaKernels(device, hopper=is_hopper(device))
    from llama2.kernels.plain import PlainKernels

    return PlainKernels()
