"""Where Triton kernels are tested: on a GPU, or on any CPU in Triton's interpreter, slowly (`make test-kernels`)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs triton, and a CUDA GPU or TRITON_INTERPRET=1",
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies the bits of bf16 as if they were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
