"""A CPU's product with a quantized weight is the product with its values, and a row's bits do not depend on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama2.errors import InvalidValue
from llama2.kernels import choose_kernels
from llama2.kernels.cpu.kernels import CpuKernels
from llama2.weights.formats import Format, Weight
from llama2.weights.formats.plain import Plain
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8
from tests.support.formats import FORMATS, copy_of, random_weight

CPU = torch.device("cpu")


ROUNDED = [name for name in FORMATS if not name.startswith("nf4")]


def kernels(activation_dtype: str = "auto") -> CpuKernels:
    chosen = choose_kernels(CPU, torch.bfloat16, activation_dtype)
    assert isinstance(chosen, CpuKernels), "the operators do not compile here"
    return chosen


def prepared(*weights: Weight, activation_dtype: str = "auto") -> Any:
    copies = [copy_of(one) for one in weights]
    linear = kernels(activation_dtype).prepare({"weight": copies}, threads=1)["weight"]
    assert isinstance(linear, torch.ScriptObject)
    return linear


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("outputs", [1, 16, 40, 64, 100])
@pytest.mark.parametrize("inputs", [96, 288, 576])
def test_the_product_is_that_of_the_values(name: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(FORMATS[name], outputs, inputs)
    values, linear = weight.dequantize(), prepared(weight)
    for rows in (0, 1, 2, 5, 12, 13, 48, 49, 130):
        x = torch.randn(rows, inputs).bfloat16()
        exact = x.double() @ values.double().T
        # The result's rounding, and for a table whose values are none of bf16's theirs.
        error = (kernels().linear(x, linear).double() - exact).abs()
        size = x.double().abs() @ values.double().abs().T
        assert (error <= exact.abs() * 2**-8 + size * (2**-18 if name in ROUNDED else 2**-9)).all(), rows


def rounded(x: torch.Tensor, step: int) -> torch.Tensor:
    """Each step's inputs as whole numbers from -127 to 127, times what makes the largest of them 127."""
    steps = x.float().unflatten(1, (-1, step))
    largest = steps.abs().amax(2, keepdim=True)
    return ((steps * torch.tensor(127.0).div(largest)).round() * (largest / 127)).flatten(1).double()


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("outputs", [1, 40, 100])
@pytest.mark.parametrize("inputs", [96, 576])
def test_with_int8_activations_it_is_that_of_rounded_rows(name: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = random_weight(FORMATS[name], outputs, inputs)
    # A minimum is multiplied by the sum of the inputs as they are.
    without = {part: torch.zeros_like(values) if part == "mins" else values for part, values in weight.parts.items()}
    scaled = Weight(format=weight.format, parts=without).dequantize().double()
    minima = weight.dequantize().double() - scaled
    groups = [inputs * outputs // values.numel() for part, values in weight.parts.items() if part != "codes"]
    step = next(step for step in (64, 32, 16) if not any(group % step for group in groups))
    linear = prepared(weight, activation_dtype="int8")
    for rows in (1, 8, 9, 130):
        x = torch.randn(rows, inputs).bfloat16()
        exact = rounded(x, step) @ scaled.T + x.double() @ minima.T
        error = (kernels().linear(x, linear).double() - exact).abs()
        size = x.double().abs() @ (scaled.abs() + minima.abs()).T
        assert (error <= exact.abs() * 2**-8 + size * 2**-18).all(), rows


def test_int8_activations_are_not_for_values_that_int8_cannot_hold() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(FORMATS["nf4"], 40, 96), torch.randn(9, 96).bfloat16()
    both = [kernels().linear(x, prepared(weight, activation_dtype=name)) for name in ("auto", "int8")]
    assert torch.equal(*both)


def test_rows_of_zeros_and_of_one_large_value_survive_rounding() -> None:
    torch.manual_seed(0)
    weight, x = random_weight(FORMATS["q8"], 40, 96), torch.zeros(2, 96).bfloat16()
    x[1, 5] = 1e30
    y = kernels().linear(x, prepared(weight, activation_dtype="int8"))
    assert torch.equal(y[0], torch.zeros(40).bfloat16())
    torch.testing.assert_close(y[1].double(), x[1, 5].double() * weight.dequantize()[:, 5].double(), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("name", "activation_dtype"), [*((name, "auto") for name in FORMATS), *((name, "int8") for name in ROUNDED)]
)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_in_any_company(
    name: str, activation_dtype: str, threads: int, set_threads: Callable[[int], None]
) -> None:
    torch.manual_seed(0)
    set_threads(threads)
    x, mine = torch.randn(130, 288).bfloat16(), kernels()
    linear = prepared(random_weight(FORMATS[name], 300, 288), activation_dtype=activation_dtype)
    together = mine.linear(x, linear)
    for size in (*range(1, 14), 17, 47, 48, 49, 64):
        assert torch.equal(torch.cat([mine.linear(piece, linear) for piece in x.split(size)]), together), size


def test_several_weights_of_one_input_are_one() -> None:
    """As the queries, keys and values of a file that has more bits for the last."""
    torch.manual_seed(0)
    plain = Weight(format=Plain(torch.bfloat16), parts={"weight": torch.randn(24, 96).bfloat16()})
    weights = [random_weight(FORMATS["q4k"], 72, 96), random_weight(FORMATS["q8"], 40, 96), plain]
    x, mine = torch.randn(7, 96).bfloat16(), kernels()
    expected = torch.cat([mine.linear(x, prepared(weight)) for weight in weights], dim=1)
    assert torch.equal(mine.linear(x, prepared(*weights)), expected)


def test_a_prepared_weight_takes_no_memory() -> None:
    weight = random_weight(FORMATS["q4k of two levels"], 96, 192)
    places = {name: part.data_ptr() for name, part in weight.parts.items()}
    before = {name: part.flatten().sort().values for name, part in weight.parts.items() if name != "codes"}
    kernels().prepare({"weight": [weight]}, threads=1)
    assert {name: part.data_ptr() for name, part in weight.parts.items()} == places
    for name, values in before.items():
        assert torch.equal(weight.parts[name].flatten().sort().values, values), name


@pytest.mark.parametrize("format", [Q8(group=8), Q4(group=8)])
def test_groups_too_small_for_the_operators_are_left_to_pytorch(format: Format) -> None:
    weight = random_weight(format, 24, 64)
    linear = kernels().prepare({"weight": [weight]}, threads=1)["weight"]
    x = torch.randn(3, 64).bfloat16()
    torch.testing.assert_close(
        kernels().linear(x, linear), (x.float() @ weight.dequantize().T).bfloat16(), atol=0.05, rtol=0.05
    )


def test_wrong_parts_are_refused() -> None:
    codes, scales = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(4, 2)
    table = [0.0] * 16
    make = torch.ops.llama2_cpu.prepare_quantized
    for wrong in [
        (codes[0], scales, table),
        (codes.int(), scales, table),
        (codes, scales[:3], table),
        (codes, scales.double(), table),
        (codes, torch.ones(4, 3), table),
        (codes, torch.ones(4, 0), table),
        (codes, torch.ones(2, 4).T, table),
        (codes, scales, []),
        (codes.to(torch.int8), scales, table),
    ]:
        with pytest.raises(RuntimeError, match="linear"):
            make(wrong[0], wrong[1], None, None, None, None, wrong[2], False)
    with pytest.raises(RuntimeError, match="zeros of codes of 4 bits are 0 to 16"):
        make(codes, scales, torch.full((4, 2), 17, dtype=torch.uint8), None, None, None, table, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int8_activations_are_refused_where_no_operator_has_them(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidValue, match="int8 is for models of bfloat16 on a CPU with a C\\+\\+ compiler"):
        choose_kernels(CPU, dtype, "int8")
