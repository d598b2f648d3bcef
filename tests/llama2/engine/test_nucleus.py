"""Each device's search finds the floor that a sort finds.

tests/support/triton.py says where the Triton kernel runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama2.engine import sampler as sampler_module
from llama2.engine.nucleus import nucleus_floor, plain_nucleus_floor
from llama2.engine.sampler import Sampler
from llama2.kernels.cpu.library import load_library
from tests.support.sampling import make_logits, make_sequence
from tests.support.triton import DEVICE, needs_triton

# Less than one chunk of the kernel, not a multiple of a vector's width; two chunks and a piece.
VOCAB_SIZES = [1, 301, 20_000]
TOP_P = [5e-324, 1e-9, 0.05, 0.5, 0.9, 0.999, 1 - 1e-12, 1.0]

Floor = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Floors = Callable[[torch.Tensor, list[int], list[float]], list[float]]


def on_gpu(weights_NV: torch.Tensor, top_k_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
    from llama2.kernels.cuda import sampling

    return sampling.nucleus_floor(weights_NV.to(DEVICE), top_k_N.to(DEVICE), top_p_N.to(DEVICE)).cpu()


def listed(floor: Floor) -> Floors:
    def floors(weights_NV: torch.Tensor, top_k: list[int], top_p: list[float]) -> list[float]:
        return floor(weights_NV, torch.tensor(top_k), torch.tensor(top_p, dtype=torch.float64)).tolist()

    return floors


@pytest.fixture(
    params=[
        pytest.param(nucleus_floor, id="cpu"),
        pytest.param(
            on_gpu,
            id="gpu",
            marks=needs_triton,
        ),
    ]
)
def floor(request: pytest.FixtureRequest) -> Floor:
    assert load_library(), "else the CPU's is the sort itself"
    return request.param


@pytest.fixture
def floors(floor: Floor) -> Floors:
    return listed(floor)


sorted_floors = listed(plain_nucleus_floor)


def rows_of(vocab_size: int) -> torch.Tensor:
    """Counts below 2^8, so that no sum is rounded: many ties, some zeros, one-hot, uniform, nothing, a long tail."""
    generator = torch.Generator().manual_seed(vocab_size)
    ties = torch.randint(0, 5, (vocab_size,), generator=generator)
    spread = torch.randint(0, 256, (vocab_size,), generator=generator)
    mostly_zero = spread * (torch.rand(vocab_size, generator=generator) < 0.05)
    one_hot = torch.zeros(vocab_size, dtype=torch.int64).index_fill(0, torch.tensor([vocab_size // 2]), 7)
    tail = torch.ones(vocab_size, dtype=torch.int64).index_fill(0, torch.tensor([vocab_size - 1]), 255)
    uniform, nothing = torch.full((vocab_size,), 3), torch.zeros(vocab_size, dtype=torch.int64)
    return torch.stack([ties, spread, mostly_zero, one_hot, tail, uniform, nothing]).float()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("scale", [2.0**-8, 2.0**-140], ids=["normal", "subnormal"])
def test_a_floor_is_that_of_a_sort(floors: Floors, vocab_size: int, scale: float) -> None:
    """For every top_k with every top_p; a subnormal weight counts like any other."""
    rows_RV = rows_of(vocab_size) * scale
    top_k = sorted(
        {1, min(2, vocab_size), min(50, vocab_size), -(-vocab_size // 3), max(vocab_size - 1, 1), vocab_size}
    )
    pairs = [(k, p) for k in top_k for p in TOP_P]
    for row_V in rows_RV:
        weights_NV = row_V.expand(len(pairs), -1)
        ks, ps = map(list, zip(*pairs, strict=True))
        assert floors(weights_NV, ks, ps) == sorted_floors(weights_NV, ks, ps)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stays_is_the_fewest_that_reach_the_mass(floors: Floors, scale: float, dtype: torch.dtype) -> None:
    """For weights as logits give them, where a sort's sums are rounded: by the definition, up to fp64's rounding."""
    logits_NV = scale * torch.randn(8, 9000, generator=torch.Generator().manual_seed(1)).to(dtype).float()
    weights_NV = (logits_NV - logits_NV.amax(-1, keepdim=True)).exp()
    top_k = [9000, 1, 40, 9000, 700, 9000, 9000, 8999]
    top_p = [0.9, 0.9, 0.5, 1e-6, 0.999, 1 - 1e-9, 1.0, 1.0]
    found = floors(weights_NV, top_k, top_p)
    for weights_V, k, p, floor in zip(weights_NV.double(), top_k, top_p, found, strict=True):
        kept_V = weights_V[weights_V >= weights_V.topk(k).values[-1]]
        stays_V = kept_V[kept_V >= floor]
        assert floor in weights_V or (k, p, floor) == (9000, 1.0, 0.0)
        if p == 1:
            assert len(stays_V) == len(kept_V)
        else:
            mass = math.fsum(kept_V.tolist()) * p
            assert math.fsum(stays_V.tolist()) >= mass * (1 - 1e-12)
            assert math.fsum(kept_V[kept_V > floor].tolist()) < mass * (1 + 1e-12)


def test_a_floor_has_the_same_bits_in_any_company(floors: Floors) -> None:
    weights_NV = torch.rand(6, 10_000, generator=torch.Generator().manual_seed(2)) ** 8
    top_k, top_p = [1, 10_000, 50, 10_000, 4000, 10_000], [0.9, 0.95, 1.0, 1.0, 0.3, 0.1]
    together = floors(weights_NV, top_k, top_p)
    assert floors(weights_NV.flip(0), top_k[::-1], top_p[::-1]) == together[::-1]
    for row, floor in enumerate(together):
        assert floors(weights_NV[row : row + 1], top_k[row : row + 1], top_p[row : row + 1]) == [floor]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_a_nan_or_inf_row_ends_and_disturbs_no_other(floors: Floors, bad: float) -> None:
    """Its floor means nothing: the sampler refuses the row."""
    weights_NV = rows_of(301)[:3]
    expected = floors(weights_NV, [40] * 3, [0.8] * 3)
    for broken_V in (torch.full((301,), bad), torch.where(torch.arange(301) == 5, bad, weights_NV[1])):
        weights_NV[1] = broken_V
        found = floors(weights_NV, [40] * 3, [0.8] * 3)
        assert [found[0], found[2]] == [expected[0], expected[2]]
        floors(weights_NV, [301] * 3, [0.8] * 3)


def test_a_sampler_draws_the_same_tokens(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    filters: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_p": 1.0},
        {"top_p": 0.9},
        {"top_k": 5, "top_p": 1.0},
        {"top_k": 100, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 2.0, "top_p": 0.999},
    ]
    logits_RV = make_logits(24, 3000)
    sequences = [make_sequence(row, **filters[row % 6]) for row in range(24)]
    monkeypatch.setattr(sampler_module, "nucleus_floor", plain_nucleus_floor)
    expected = Sampler(0).sample(logits_RV, sequences).read()
    monkeypatch.setattr(sampler_module, "nucleus_floor", floor)
    assert Sampler(0).sample(logits_RV, sequences).read() == expected
