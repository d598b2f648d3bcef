"""Owns what a forward pass knows of adapters: which row has which, and the matrices that are added to each product.

Knows no files and no ranks. Products are those of the model in flight, so that one of weights that share their input
has several parts: wqkv has wq, wk and wv.

Shape suffixes: S slots, P parts, R adapter ranks, C inputs, F outputs of the whole product, T rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

# Of a layer: its products in flight, and the weights whose outputs they have, in order.
PRODUCTS: Mapping[str, tuple[str, ...]] = {
    "attention.wqkv": ("attention.wq", "attention.wk", "attention.wv"),
    "attention.wo": ("attention.wo",),
    "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3"),
    "feed_forward.w2": ("feed_forward.w2",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraProduct:
    """What the slots' adapters add to one product. To outputs p of a row x (C,) in slot s is added

        scales_SP[s, p] * (a_SPRC[s, p, :r] @ x) @ b_SRF[s, :r, p],  where r = ranks_SP[s, p],

    where both products are fp32, and the sum alone is rounded to the row's dtype. `outputs` are the sizes of the parts,
    whose sum is F. Memory beyond rank r may hold anything. ranks_SP is int32, 0 for a part that the
    adapter does not change; scales_SP is fp32, the others in the dtype of the model. Slots are strided: only the last
    three axes of a_SPRC, and the last two of b_SRF, are contiguous.
    """

    a_SPRC: torch.Tensor
    b_SRF: torch.Tensor
    ranks_SP: torch.Tensor
    scales_SP: torch.Tensor
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchAdapters:
    """What a forward pass adds: `slots_T` (int32) says in which slot each row's adapter is, -1 for none. `layers` has
    every layer's products, by the names of PRODUCTS.
    """

    slots_T: torch.Tensor
    layers: Sequence[Mapping[str, LoraProduct]]
