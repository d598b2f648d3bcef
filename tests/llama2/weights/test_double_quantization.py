"""Double quantization: scales in 8 bits cost next to no precision, whatever the groups of a row are."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from benchmarks.shapes import SHAPES
from llama2.weights.formats.catalog import name_of
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.precision import PRECISIONS, target
from llama2.weights.spec import Spec

NF4, DOUBLE = Lut4(table="nf4"), Lut4(table="nf4", scales=torch.uint8)


def error(values: torch.Tensor, others: torch.Tensor) -> float:
    """Relative, as root mean squares."""
    return ((others - values).square().mean() / values.square().mean()).sqrt().item()


def test_users_and_certificates_call_it_by_one_name() -> None:
    assert PRECISIONS["nf4_double"] == DOUBLE
    assert (name_of(DOUBLE), name_of(NF4)) == ("nf4_double", "nf4")


@pytest.mark.parametrize("name", ["135m", "7b", "70b"])
def test_a_weight_takes_less_than_4_2_bits(name: str) -> None:
    args = SHAPES[name]
    spec = target(Spec(args=args, dtype=torch.bfloat16), quantize="nf4_double")
    tensors, shapes = spec.tensors(), args.parameter_shapes()
    for weight, format in spec.formats.items():
        if name_of(format) == "nf4_double":
            nbytes = sum(one.nbytes for part, one in tensors.items() if part.rpartition(".")[0] == weight)
            assert 8 * nbytes / torch.Size(shapes[f"{weight}.weight"]).numel() < 4.2, weight


@pytest.mark.parametrize("inputs", [576, 4096])
def test_it_adds_next_to_nothing_to_the_error_of_nf4(inputs: int) -> None:
    torch.manual_seed(0)
    values = torch.randn(512, inputs)
    single, double = (error(values, each.dequantize(each.quantize(values))) for each in (NF4, DOUBLE))
    assert single == pytest.approx(0.092, abs=0.001)
    assert double == pytest.approx(single, rel=1e-3)


def test_it_is_nearer_than_that_of_bitsandbytes() -> None:
    """Where groups are alike, and where they are not."""
    torch.manual_seed(0)
    for values in (torch.randn(256, 4096), torch.distributions.StudentT(3.0).sample((256, 4096))):
        theirs = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4", compress_statistics=True))
        assert error(values, DOUBLE.dequantize(DOUBLE.quantize(values))) < error(values, theirs.float())


def test_a_group_does_not_vanish_beside_a_large_one() -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 4 * 64)
    values[:, 64:128] *= 1e-4
    values[:, 128:192] = 0
    parts = DOUBLE.quantize(values)
    assert parts["scales"].min() >= 1
    found = DOUBLE.dequantize(parts)
    # As far from its values as scales are from each other, at most.
    assert ((found - values)[:, 64:128].abs() <= parts["output_scales"][:, None]).all()
    assert error(values[:, :64], found[:, :64]) < 0.1
    assert (found[:, 128:192] == 0).all()


@pytest.mark.parametrize("size", [0.0, 1e-45, 3e-43, 1e-39, 1e30])
def test_values_of_any_size(size: float) -> None:
    values = torch.linspace(-size, size, 128)[None]
    found = DOUBLE.dequantize(DOUBLE.quantize(values))
    assert found.isfinite().all()
    assert (found.abs() <= 1.01 * size + 1e-38).all()


def test_what_is_quantized_so_keeps_its_codes() -> None:
    torch.manual_seed(0)
    parts = DOUBLE.quantize(torch.randn(64, 576))
    again = DOUBLE.quantize(DOUBLE.dequantize(parts))
    assert torch.equal(again["codes"], parts["codes"])
    assert torch.equal(again["scales"], parts["scales"])
    torch.testing.assert_close(again["output_scales"], parts["output_scales"], rtol=1e-6, atol=0)
