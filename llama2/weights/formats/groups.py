"""Owns what quantized formats share: groups of neighbouring inputs, and codes of four bits.

Where the last axis of the inputs is shorter than a group, such as a head, each element of the other axes repeats the
scale of its group. So a tensor of scales says by its own size how many inputs a scale is for.

Shape suffixes: F outputs, C inputs, G groups of them, I inputs of a group.
"""

from __future__ import annotations

import torch


def count(size: int, group: int) -> int:
    """Groups along an axis of `size`.

    Raises:
        ValueError: they do not fill it.
    """
    groups = -(-size // group)
    if size % groups:
        raise ValueError(f"groups of {group} do not fill an axis of {size}")
    return groups


def spread(per_group_FG: torch.Tensor, inputs: int) -> torch.Tensor:
    """The groups' values for each of `inputs`: fp32 (F, C). (F,) is one group."""
    per_group_FG = per_group_FG.float().reshape(len(per_group_FG), -1)
    return per_group_FG.repeat_interleave(inputs // per_group_FG.shape[1], dim=1)


def repeated(values_FG: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Values (F, G) of groups as (F, ...), each as often as there is room in `shape`."""
    times = torch.Size(shape).numel() // values_FG.numel()
    return values_FG if times == 1 else values_FG.repeat_interleave(times, dim=-1)


def divide(values_FGI: torch.Tensor, scales_FG: torch.Tensor) -> torch.Tensor:
    """Values over the scales of their groups, fp32; 0 where the scale is 0."""
    scales_FG1 = scales_FG.float()[..., None]
    return torch.where(scales_FG1 == 0, 0.0, values_FGI / scales_FG1)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes (..., C) of 0 to 15, C even, as uint8 (..., C / 2): the first of two neighbours in the low half."""
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack`."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
