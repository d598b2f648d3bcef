"""A GPU's product with a quantized weight is the product with its values, and a row's bits do not depend on others.

On a GPU, or on any CPU in Triton's interpreter, as test_cuda.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from llama2.weights.formats import Format, Weight
from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.formats.plain import Plain
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q4k import Q4K
from llama2.weights.formats.q8 import Q8
from tests.support.formats import FORMATS, copy_of, random_weight
from tests.support.triton import DEVICE, HALF, needs_triton

if TYPE_CHECKING:
    from llama2.kernels.cuda.kernels import CudaKernels

pytestmark = needs_triton

# A rounding to it, relative.
EPSILON = torch.finfo(HALF).eps / 2
# Three tiles and outputs that fill none; more blocks of inputs than a program has warps.
OUTPUTS, INPUTS = 57, 576
ALL_FORMATS = {
    **FORMATS,
    "q4 of groups of 64": Q4(group=64),
    "q4k of large groups": Q4K(group=64, super_group=192),
    **{f"{table} of groups of 64": Lut4(table=table, group=64) for table in TABLES},
    "nf4_double of groups of 64": Lut4(table="nf4", group=64, scales=torch.uint8),
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, HALF)


def prepared(kernels: CudaKernels, *weights: Weight) -> Any:
    with torch.inference_mode(False):
        return kernels.prepare({"weight": [copy_of(one, DEVICE) for one in weights]}, threads=1)["weight"]


def assert_near(actual: torch.Tensor, x: torch.Tensor, values: torch.Tensor, *, rounded_values: bool) -> None:
    """Within the result's rounding, that of the values, if they are, and that of sums in fp32."""
    x, values = x.double(), values.to(DEVICE).double()
    exact, size = x @ values.T, x.abs() @ values.abs().T
    # Integers and halves of a table's values are exact in 16 bits; below fp16's normal numbers results lose bits.
    allowed = exact.abs() * EPSILON + size * (EPSILON if rounded_values else 2**-18) + 2**-24
    assert ((actual.double() - exact).abs() <= 1.01 * allowed).all()


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_the_product_is_that_of_the_values(kernels: CudaKernels, name: str) -> None:
    weight = random_weight(ALL_FORMATS[name], OUTPUTS, INPUTS)
    values, linear = weight.dequantize(), prepared(kernels, weight)
    for rows in (0, 1, 11, 33):
        x = randn(rows, INPUTS)
        rounded = rows > 32 or name.startswith(("nf4", "fp4"))
        assert_near(kernels.linear(x, linear), x, values, rounded_values=rounded)


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 2112), (16, 32)])
def test_products_of_every_shape_have_programs(kernels: CudaKernels, outputs: int, inputs: int) -> None:
    """With fewer outputs than a tile, and with fewer blocks than a program has warps."""
    weight = random_weight(Q4(group=32), outputs, inputs)
    x = randn(2, inputs)
    assert_near(kernels.linear(x, prepared(kernels, weight)), x, weight.dequantize(), rounded_values=False)


@pytest.mark.parametrize("name", ALL_FORMATS)
def test_for_many_rows_the_values_are_those_of_the_format(kernels: CudaKernels, name: str) -> None:
    """To the bit, but for tables, whose values are rounded before they are scaled."""
    weight = random_weight(ALL_FORMATS[name], OUTPUTS, INPUTS)
    linear, ones = prepared(kernels, weight), torch.eye(INPUTS).to(DEVICE, HALF)
    found, expected = kernels.linear(ones, linear).T.float(), weight.dequantize().to(DEVICE)
    tolerance = 2.02 * EPSILON if name.startswith(("nf4", "fp4")) else 1.01 * EPSILON
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=2**-24)


def test_values_are_written_out_in_slices(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many outputs at a time as there is room for: the same bits."""
    weight = random_weight(Q4(group=32), 100, 64)
    linear, x = prepared(kernels, weight), randn(33, 64)
    expected = kernels.linear(x, linear)
    monkeypatch.setattr(kernels, "_dequantized", torch.empty(40 * 64 * 2, dtype=torch.uint8, device=DEVICE))
    assert torch.equal(kernels.linear(x, linear), expected)


@pytest.mark.parametrize("name", ["q8", "q4", "q4k of small groups", "nf4"])
def test_a_row_has_the_same_bits_in_any_company(kernels: CudaKernels, name: str) -> None:
    linear = prepared(kernels, random_weight(FORMATS[name], OUTPUTS, INPUTS))
    x = randn(17, INPUTS)
    together = kernels.linear(x, linear)
    for first, last in ((0, 1), (3, 11), (8, 17)):
        assert torch.equal(kernels.linear(x[first:last], linear), together[first:last]), (first, last)


@pytest.mark.parametrize("hidden", [48, 40])
@pytest.mark.parametrize("rows", [1, 20, 40])
def test_gated_linear(kernels: CudaKernels, hidden: int, rows: int) -> None:
    """Where halves are whole tiles and where they are not."""
    weight = random_weight(Q4(group=64), 2 * hidden, 192)
    linear, x = prepared(kernels, weight), randn(rows, 192)
    gate, up = (x.float() @ weight.dequantize().to(DEVICE).T).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(kernels.gated_linear(x, linear).float(), expected, rtol=6 * EPSILON, atol=6 * EPSILON)


@pytest.mark.parametrize("rows", [3, 40])
def test_several_weights_of_one_input_are_one(kernels: CudaKernels, rows: int) -> None:
    """As the queries, keys and values of a file that has more bits for the last; also what the kernels do not take."""
    plain = Weight(format=Plain(HALF), parts={"weight": torch.randn(24, 96).to(HALF)})
    formats: tuple[Format, ...] = (Q4K(), Q8(), Q4(group=8))
    weights = [*(random_weight(one, size, 96) for one, size in zip(formats, (72, 40, 16), strict=True)), plain]
    x = randn(rows, 96)
    expected = torch.cat([kernels.linear(x, prepared(kernels, weight)) for weight in weights], dim=1)
    assert torch.equal(kernels.linear(x, prepared(kernels, *weights)), expected)


@pytest.mark.parametrize("name", ["q8 of small groups", "q4", "q4k of two levels", "nf4", "nf4_double"])
def test_a_prepared_weight_takes_no_memory(kernels: CudaKernels, name: str) -> None:
    """Where outputs fill tiles."""
    with torch.inference_mode(False):
        weight = copy_of(random_weight(FORMATS[name], 48, 192), DEVICE)
        (linear,) = kernels.prepare({"weight": [weight]}, threads=1)["weight"]
    assert {part: values.data_ptr() for part, values in linear.parts.items()} == {
        part: values.data_ptr() for part, values in weight.parts.items()
    }


@pytest.mark.parametrize(("format", "inputs"), [(Q8(group=8), 64), (Q4(group=24), 96), (Q4(group=16), 48)])
def test_groups_too_small_for_the_kernels_are_left_to_pytorch(
    kernels: CudaKernels, format: Q8 | Q4, inputs: int
) -> None:
    weight = random_weight(format, 24, inputs)
    linear, x = prepared(kernels, weight), randn(3, inputs)
    assert isinstance(linear, Weight)
    assert_near(kernels.linear(x, linear), x, weight.dequantize(), rounded_values=True)


def test_fp32_is_left_to_pytorch() -> None:
    """Its values need more bits than codes become."""
    from llama2.kernels.cuda.kernels import CudaKernels

    kernels, weight = CudaKernels(DEVICE, torch.float32), random_weight(Lut4(table="nf4"), 48, 192)
    x = torch.randn(3, 192, device=DEVICE)
    found = kernels.linear(x, prepared(kernels, weight))
    torch.testing.assert_close(found, x @ weight.dequantize().to(DEVICE).T, rtol=1e-5, atol=1e-5)
