"""Owns the recognition of Llama 3.1's scaled rotary embedding, of which a GGUF file has nothing but the divisors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from llama2.rope import ScaledRope

_TOLERANCE = 1e-5


def recognize(divisors: npt.NDArray[Any], rope_theta: float) -> ScaledRope | None:
    """The scaling that divides the frequencies `rope_theta ** (-i / len(divisors))` so; None: all are kept.

    Raises:
        ValueError: no scaling of this kind has these divisors.
    """
    divisors = divisors.astype(np.float64)
    if not (np.isfinite(divisors) & (divisors >= 1)).all():
        raise ValueError("rope_freqs.weight must have numbers from 1 up")
    if (divisors == 1).all():
        return None
    frequencies = rope_theta ** -(np.arange(len(divisors)) / len(divisors))
    for scaled in _candidates(divisors, frequencies):
        if np.allclose([scaled.divisor(each) for each in frequencies], divisors, rtol=_TOLERANCE, atol=0):
            return scaled
    raise ValueError("rope_freqs.weight divides the rotary frequencies otherwise than Llama 3.1 does")


def _candidates(divisors: npt.NDArray[Any], frequencies: npt.NDArray[Any]) -> Iterator[ScaledRope]:
    """First the numbers of Llama 3.1 and 3.2, which differ in the factor alone, then those that the divisors give.

    Between a frequency that is kept and one that is divided by the whole factor, how much is kept of it is linear in
    it. The two points where that is 0 and 1 give the other parameters, up to a common multiple: the lower one is 1.
    """
    factor = round(float(divisors.max()), 4)
    yield ScaledRope(factor=factor)
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (kept > _TOLERANCE) & (kept < 1 - _TOLERANCE)
    if np.count_nonzero(between) < 2:
        return
    slope, start = map(float, np.polyfit(frequencies[between], kept[between], 1))
    if slope > 0 > start:
        high = round(1 - 1 / start, 4)
        length = round(slope * (high - 1) * 2 * math.pi)
        if high > 1 and length >= 1:
            yield ScaledRope(factor=factor, low_freq_factor=1.0, high_freq_factor=high, original_context_length=length)
