"""Owns what a quantized weight of a Hugging Face folder gives to its reader, however it is stored.

A method of quantization is a module here: it reads `quantization_config`, and opens weights by it.

Shape suffixes, here and there: F outputs, C inputs, G groups of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch

from llama2.weights.formats import Format
from llama2.weights.readers.tensor_files import TensorFiles

T = TypeVar("T")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Values that are dequantized at once.
_BLOCK = 1 << 22


class StoredWeight(Protocol):
    """A matrix (F, C) in files, opened and checked, of which nothing large is read yet.

    Attributes:
        format: holds it exactly, in groups no larger than the format's own that `holds` allows.
        parts: of the format.
        names: of the tensors that it is stored in, with `nbytes`.
        kind: the method, and what of it decides whether a format holds the weight.
    """

    @property
    def kind(self) -> str: ...

    @property
    def format(self) -> Format: ...

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def holds(self, group: int | None) -> bool:
        """Have all inputs of each such group the same scale? None: all inputs of an output."""

    def read(self, part: str, step: int) -> torch.Tensor:
        """A part (F, ...) in memory; scales and zeros are of every `step`-th input.

        Raises:
            ValueError: its values are no such part's.
        """


class Method(Protocol):
    """A way to quantize, as a config describes it."""

    def open(self, files: TensorFiles, name: str, shape: tuple[int, int]) -> StoredWeight | None:
        """The weight (F, C) of the module `name`, such as `model.layers.0.mlp.up_proj`; None: it is plain.

        Raises:
            ValueError: its tensors are not what the config says.
        """


def dequantized(weight: StoredWeight, dtype: torch.dtype) -> torch.Tensor:
    """The values (F, C), some rows at a time: they need several times their memory."""
    parts = {part: weight.read(part, 1) for part in weight.parts}
    outputs, inputs = parts["scales"].shape
    result = torch.empty((outputs, inputs), dtype=dtype)
    step = max(1, _BLOCK // inputs)
    for row in range(0, outputs, step):
        rows = {part: values[row : row + step] for part, values in parts.items()}
        result[row : row + step] = weight.format.dequantize(rows)
    return result


def one_of(config: Mapping[str, Any], key: str, allowed: tuple[T, ...], default: T | None = None) -> T:
    """What a config says of `key`, `default` where it says nothing.

    Raises:
        ValueError: it is none of `allowed`, or is missing and has no default.
    """
    value = config.get(key, default)
    for each in allowed:
        if type(value) is type(each) and value == each:
            return each
    raise ValueError(f"{key} must be {' or '.join(map(repr, allowed))}, got {value!r}")
