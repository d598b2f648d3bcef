"""A weight of every quantized format, with random codes."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from llama2.weights.formats import Format, Weight
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q4k import Q4K
from llama2.weights.formats.q8 import Q8

FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "q8": Q8(),
        "q8 of small groups": Q8(group=16, scales=torch.float32),
        "q8 per row": Q8(group=None),
        "q4": Q4(group=32),
        "q4 of large groups": Q4(group=96),
        "q4 per row": Q4(group=None),
        "q4 around 8": Q4(group=32, zero=8),
        "q4k": Q4K(),
        "q4k of two levels": Q4K(group=32, super_group=96),
        "q4k of small groups": Q4K(group=16, super_group=96),
        "nf4": Lut4(table="nf4", group=32),
        "nf4_double": Lut4(table="nf4", group=32, scales=torch.uint8),
        "iq4_nl": Lut4(table="iq4_nl", group=32, scales=torch.float16),
    }
)


def random_weight(format: Format, outputs: int, inputs: int) -> Weight:
    parts = {}
    for name, (shape, dtype) in format.parts((outputs,), (inputs,)).items():
        if dtype in (torch.float16, torch.float32):
            size = -0.1 if name.endswith("mins") else 0.02
            parts[name] = (size * torch.rand(shape)).to(dtype)
        else:
            low, high = (-128, 128) if dtype == torch.int8 else (0, 17 if name == "zeros" else 256)
            parts[name] = torch.randint(low, high, shape, dtype=dtype)
    return Weight(format=format, parts=parts)


def copy_of(weight: Weight, device: torch.device | None = None) -> Weight:
    """The same values in memory of their own: preparing a weight lays it out anew."""
    parts = {name: part.clone().to(device or part.device) for name, part in weight.parts.items()}
    return Weight(format=weight.format, parts=parts)
