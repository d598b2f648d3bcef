"""What several tests of kernels need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, cast

import pytest
import torch

from llama2.kernels import choose_kernels
from tests.support.triton import DEVICE, HALF

if TYPE_CHECKING:
    from llama2.kernels.cuda.kernels import CudaKernels


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    """Triton's, as they are chosen for a GPU; the interpreter knows nothing of Hopper's own."""
    from llama2.kernels.cuda.kernels import CudaKernels

    if DEVICE.type == "cuda":
        return cast("CudaKernels", choose_kernels(DEVICE, torch.bfloat16))
    return CudaKernels(DEVICE, HALF)
