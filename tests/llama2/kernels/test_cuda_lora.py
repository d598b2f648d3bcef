"""What adapters add on a GPU is what plain PyTorch adds; as in test_cuda.py, also in Triton's interpreter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from llama2.kernels.plain import PlainKernels
from tests.support.lora import random_product
from tests.support.triton import DEVICE, HALF, needs_triton

if TYPE_CHECKING:
    from llama2.kernels.cuda.kernels import CudaKernels

pytestmark = needs_triton

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Of which each is a program's own, and which are computed in tiles.
ROWS = (5, 37)
PLAIN = PlainKernels()


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("rows", [0, *ROWS])
@pytest.mark.parametrize(
    ("inputs", "outputs", "max_rank"), [(64, (128, 64, 64), 8), (1100, (70,), 40), (33, (7, 1, 200), 1)]
)
def test_it_adds_what_plain_pytorch_adds(
    kernels: CudaKernels, dtype: torch.dtype, rows: int, inputs: int, outputs: tuple[int, ...], max_rank: int
) -> None:
    """To rows of any slot or none. Memory beyond an adapter's rank is NaN."""
    lora = random_product(inputs, outputs, max_rank=max_rank, dtype=dtype, device=DEVICE)
    x, y = randn(rows, inputs, dtype=dtype), randn(rows, sum(outputs), dtype=dtype)
    slots_T = torch.randint(-1, 5, (rows,), dtype=torch.int32).to(DEVICE)
    slots_T[16:] = 1  # a prompt's
    expected = PLAIN.add_lora(y.clone(), x, lora, slots_T)
    actual = kernels.add_lora(y.clone(), x, lora, slots_T)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)
    assert torch.equal(actual[slots_T < 0], y[slots_T < 0])


@pytest.mark.parametrize("rows", ROWS)
def test_a_pass_in_which_no_row_has_an_adapter_adds_nothing(kernels: CudaKernels, rows: int) -> None:
    lora, y = random_product(64, (48, 16), dtype=HALF, device=DEVICE), randn(rows, 64, dtype=HALF)
    slots_T = torch.full((rows,), -1, dtype=torch.int32, device=DEVICE)
    assert torch.equal(kernels.add_lora(y.clone(), randn(rows, 64, dtype=HALF), lora, slots_T), y)


@pytest.mark.parametrize("rows", ROWS)
def test_a_row_has_the_same_bits_in_any_company(kernels: CudaKernels, rows: int) -> None:
    """Of as many rows, whose slots are others; and, where a program has one row, alone."""
    lora = random_product(1100, (70, 10), dtype=HALF, device=DEVICE)
    x, y = randn(rows, 1100, dtype=HALF), randn(rows, 80, dtype=HALF)
    slots_T = torch.randint(0, 5, (rows,), dtype=torch.int32).to(DEVICE)
    together = kernels.add_lora(y.clone(), x, lora, slots_T)
    for row in (0, 3, rows - 1):
        others_T = torch.full_like(slots_T, -1)
        others_T[row] = slots_T[row]
        assert torch.equal(kernels.add_lora(y.clone(), x, lora, others_T)[row], together[row]), row
        if rows == ROWS[0]:
            one = slice(row, row + 1)
            assert torch.equal(kernels.add_lora(y[one].clone(), x[one], lora, slots_T[one])[0], together[row]), row
