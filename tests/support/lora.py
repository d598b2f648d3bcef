"""Slots full of random adapters, for the tests of kernels. Memory that no kernel may read is NaN."""

from __future__ import annotations

import torch

from llama2.adapters.products import LoraProduct
from llama2.config import ModelArgs

CPU = torch.device("cpu")
PAD = 40  # values between slots


def random_product(
    inputs: int,
    outputs: tuple[int, ...],
    *,
    num_slots: int = 5,
    max_rank: int = 16,
    dtype: torch.dtype,
    device: torch.device = CPU,
) -> LoraProduct:
    """Each part of each slot has a rank of its own, from 0 to `max_rank`; what they add is near 1 for inputs near 1.

    Slots lie apart: drawn on the CPU, so that devices can be compared.
    """
    parts = len(outputs)
    ranks_SP = torch.randint(0, max_rank + 1, (num_slots, parts), dtype=torch.int32)
    ranks_SP[0] = max_rank
    ranks_SP[-1, -1] = 0
    scales_SP = 0.5 + torch.rand(num_slots, parts)
    a_SPRC = torch.randn(num_slots, parts, max_rank, inputs) / inputs**0.5
    b_SRF = torch.randn(num_slots, max_rank, sum(outputs)) / max_rank**0.5
    rank_R = torch.arange(max_rank)
    a_SPRC[rank_R >= ranks_SP[..., None]] = torch.nan
    ranks_SF = ranks_SP.repeat_interleave(torch.tensor(outputs), dim=1)
    b_SRF[rank_R[:, None] >= ranks_SF[:, None]] = torch.nan
    return LoraProduct(
        a_SPRC=_apart(a_SPRC.to(dtype), device),
        b_SRF=_apart(b_SRF.to(dtype), device),
        ranks_SP=_apart(ranks_SP, device),
        scales_SP=_apart(scales_SP, device),
        outputs=outputs,
    )


def random_layers(
    args: ModelArgs, *, max_rank: int = 16, dtype: torch.dtype, device: torch.device = CPU
) -> list[dict[str, LoraProduct]]:
    """For every layer of a model of one rank."""
    heads, kv_heads = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes = {
        "attention.wqkv": (args.dim, (heads, kv_heads, kv_heads)),
        "attention.wo": (heads, (args.dim,)),
        "feed_forward.w13": (args.dim, (args.hidden_dim, args.hidden_dim)),
        "feed_forward.w2": (args.hidden_dim, (args.dim,)),
    }
    return [
        {name: random_product(*shape, max_rank=max_rank, dtype=dtype, device=device) for name, shape in shapes.items()}
        for _ in range(args.n_layers)
    ]


def _apart(values_S: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values, with a gap after each slot."""
    flat_SN = values_S.flatten(1)
    fill = torch.nan if values_S.is_floating_point() else -1
    spaced_SN = torch.full((len(flat_SN), flat_SN.shape[1] + PAD), fill, dtype=values_S.dtype, device=device)
    spaced_SN[:, : flat_SN.shape[1]] = flat_SN.to(device)
    return spaced_SN[:, : flat_SN.shape[1]].unflatten(1, values_S.shape[1:])
