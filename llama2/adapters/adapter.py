"""Owns what an adapter is, once it is read: for each weight that it changes, two small matrices and a factor.

Knows no file, no device and no rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Weights whose outputs or inputs are the hidden features.
HIDDEN = (".w1", ".w2", ".w3")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """What is added to a weight (F, C): `scaling` times B (F, R) times A (R, C), with Meta's order of outputs."""

    a_RC: torch.Tensor
    b_FR: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a_RC)

    def delta(self) -> torch.Tensor:
        """What is added to the weight (F, C), in fp32."""
        return self.scaling * (self.b_FR.float() @ self.a_RC.float())


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`pairs` are by the weight's name, such as `layers.0.attention.wq`. `identity` is the hash of its config and its
    weights: two adapters of one identity compute the same.
    """

    identity: bytes
    pairs: Mapping[str, LoraPair]

    @property
    def changes_hidden(self) -> bool:
        """Does it depend on the order of the hidden features?"""
        return any(name.endswith(HIDDEN) for name in self.pairs)

    @property
    def rank(self) -> int:
        """The largest of its pairs."""
        return max(pair.rank for pair in self.pairs.values())


def layers_by_shape(ranks: Mapping[str, int]) -> dict[tuple[str, int], list[int]]:
    """The layers whose matrices are of one shape, so that one operation does for all of them.

    Args:
        ranks: by the weight's name, such as `layers.0.attention.wq`.

    Returns:
        The numbers of the layers, by the weight's name in a layer, such as `attention.wq`, and the rank.
    """
    found: dict[tuple[str, int], list[int]] = {}
    for name, rank in ranks.items():
        _, layer, weight = name.split(".", 2)
        found.setdefault((weight, rank), []).append(int(layer))
    return found


def is_finite(values: torch.Tensor) -> bool:
    """Is none of the values NaN or infinite? Reads them once, and makes no other tensor as `isfinite` does."""
    return all(math.isfinite(extreme.item()) for extreme in values.aminmax())
