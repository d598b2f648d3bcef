"""Which degrees a model can take, and that the plan covers every parameter."""

from __future__ import annotations

import pytest

from llama2.config import ModelArgs
from llama2.parallel.splits import PLAN, degrees, split
from tests.support.weights import tiny_args

LLAMA_7B = ModelArgs.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000})
LLAMA_13B = ModelArgs.from_params({"dim": 5120, "n_layers": 40, "n_heads": 40, "vocab_size": 32000})
LLAMA_70B = ModelArgs.from_params(
    {
        "dim": 8192,
        "n_layers": 80,
        "n_heads": 64,
        "n_kv_heads": 8,
        "vocab_size": 32000,
        "multiple_of": 4096,
        "ffn_dim_multiplier": 1.3,
    }
)
SMOLLM2 = ModelArgs.from_params({"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49152})


@pytest.mark.parametrize(
    ("args", "some"),
    [
        (LLAMA_7B, [1, 2, 3, 4, 6, 8, 16, 32]),
        (LLAMA_13B, [1, 2, 3, 4, 5, 6, 8, 10, 20, 40]),
        (LLAMA_70B, [1, 2, 3, 4, 8, 16, 32, 64]),
        (SMOLLM2, [1, 2, 3, 6, 9]),
    ],
    ids=["7B", "13B", "70B", "SmolLM2"],
)
def test_the_usual_degrees_are_taken(args: ModelArgs, some: list[int]) -> None:
    assert set(some) <= set(degrees(args))


def test_a_degree_that_leaves_a_rank_without_a_head_is_not_taken() -> None:
    assert degrees(LLAMA_70B) == [1, 2, 3, 4, 8, 16, 24, 32, 64]
    assert degrees(SMOLLM2) == [1, 2, 3, 6, 9]
    assert degrees(tiny_args(n_kv_heads=4)) == [1, 2, 4, 8]


def test_uneven_degrees_split_at_head_borders() -> None:
    assert split(32, 3, 1) == [11, 11, 10]
    assert split(3, 2, 1) == [2, 1]


@pytest.mark.parametrize("size", [96, 509])
@pytest.mark.parametrize(("kv", "rep"), [(1, 1), (3, 1), (2, 4), (3, 2)])
def test_a_split_loses_nothing(size: int, kv: int, rep: int) -> None:
    parts = split(size, kv, rep)
    assert sum(parts) == size
    assert len(parts) == kv * rep
    assert min(parts) > 0


def test_the_plan_cuts_every_matrix_and_no_vector() -> None:
    for name, axes in tiny_args().weight_axes().items():
        assert bool({*axes.outputs, *axes.inputs} & PLAN.keys()) == bool(axes.inputs), name


def test_units_are_not_cut() -> None:
    """86 groups of 128 over 4 ranks are 22, 22, 22 and 20; and 16 ranks would leave some without one."""
    assert split(LLAMA_7B.hidden_dim // 128, 4, 1) == [22, 22, 22, 20]
    units = {"hidden": 128}
    assert set(degrees(LLAMA_7B)) - set(degrees(LLAMA_7B, units)) == {16, 32}
