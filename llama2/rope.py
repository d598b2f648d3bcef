"""Owns how the rotary embedding of a model was changed for longer texts, and how Meta's `params.json` says so.

Knows no torch: what becomes of it is computed in `model`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Meta's keys, and the fields that they stand for. The last one is not Meta's, whose code has its value as a constant.
_PARAMS = {
    "rope_scaling_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "rope_original_context_length": "original_context_length",
}
PARAMS_KEYS = frozenset({"use_scaled_rope", *_PARAMS})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledRope:
    """Llama 3.1's scaling of rotary frequencies; the defaults are its own (llama-models, `apply_scaling`).

    Of a model that was first trained on `original_context_length` positions, frequencies that turn more than
    `high_freq_factor` times in those stay, frequencies that turn less than `low_freq_factor` times are divided by
    `factor`, and what lies between is interpolated.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"scaled rotary embedding: {name} must be a positive number, got {value!r}")
        length = self.original_context_length
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(
                f"scaled rotary embedding: original_context_length must be a positive integer, got {length!r}"
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"scaled rotary embedding: low_freq_factor must be less than high_freq_factor={self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> ScaledRope | None:
        """What `params.json` says; None: nothing is scaled. Meta's file of Llama 3.1 names no number.

        Raises:
            ValueError: a number is wrong, or there is one where `use_scaled_rope` is not true.
        """
        given = {field: params[key] for key, field in _PARAMS.items() if params.get(key) is not None}
        scaled = params.get("use_scaled_rope")
        if scaled not in (None, True, False):
            raise ValueError(f"params.json: use_scaled_rope must be true or false, got {scaled!r}")
        if scaled:
            return cls(**given)
        if given:
            key = next(key for key in _PARAMS if params.get(key) is not None)
            raise ValueError(f"params.json: {key} belongs to use_scaled_rope, which is not true")
        return None

    def to_params(self) -> dict[str, Any]:
        """Meta's keys. Numbers are named only where they are not Llama 3.1's."""
        usual = ScaledRope()
        own = {key: getattr(self, field) for key, field in _PARAMS.items()}
        return {"use_scaled_rope": True} | {
            key: value for key, value in own.items() if value != getattr(usual, _PARAMS[key])
        }

    def divisor(self, frequency: float) -> float:
        """What a frequency, in radians per position, is divided by."""
        turns = self.original_context_length * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        return 1 / (kept + (1 - kept) / self.factor)


def trained_length(rope_theta: Any, scaled_rope: ScaledRope | None) -> int:
    """How many positions Meta's models with such a rotary embedding were trained for: 4096 where none is known."""
    if scaled_rope is not None:
        return 131072
    return {500_000.0: 8192, 1_000_000.0: 16384}.get(rope_theta, 4096)
