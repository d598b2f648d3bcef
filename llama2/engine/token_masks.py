"""Owns how masks of tokens reach logits: all rows of a step at once. Knows no grammar.

A mask has a bit for each id, 32 in an int32 word, the lowest id's first. Axes: N rows, V vocabulary, W words of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from functools import cache

import numpy as np
import torch
from torch import Tensor

from llama2.engine.transfer import upload_rows


def forbid(logits_NV: Tensor, masks: Items[Tensor]) -> Tensor:
    """(N, V): -inf wherever a row's mask has no bit. The masks (W,) are on the CPU, W = ⌈V / 32⌉."""
    words_NW = upload_rows(masks, logits_NV)
    vocab_size = logits_NV.shape[-1]
    if logits_NV.device.type == "cpu":
        return logits_NV + _barrier(words_NW)[:, :vocab_size]
    return logits_NV.masked_fill(_is_forbidden(words_NW)[:, :vocab_size], -torch.inf)


def _barrier(words_NW: Tensor) -> Tensor:
    """What to add: 0 where there is a bit, else -inf.

    By bytes: 4 to 12 times as fast on a CPU as shifting out every bit (1 and 32 rows of 49,152).
    """
    bytes_NB = words_NW.numpy().view(np.uint8)
    return torch.from_numpy(_barriers().take(bytes_NB, axis=0)).flatten(1)


@cache
def _barriers() -> np.ndarray:
    """(256, 8) fp32: what each value of a byte adds to 8 logits."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return np.where(bits, np.float32(0), np.float32(-np.inf))


def _is_forbidden(words_NW: Tensor) -> Tensor:
    bit_B = torch.arange(32, dtype=torch.int32, device=words_NW.device)
    return (words_NW[:, :, None] >> bit_B & 1 == 0).flatten(1)
