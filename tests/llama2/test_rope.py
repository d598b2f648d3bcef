"""Rotary tables are those of transformers, which computes them by formulas of its own."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama2.model import rotary_table
from llama2.rope import ScaledRope
from tests.support.weights import tiny_args

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    "changes",
    [{}, {"factor": 32.0}, {"low_freq_factor": 2.0, "high_freq_factor": 3.0, "original_max_position_embeddings": 512}],
    ids=str,
)
def test_llama_3_1_scales_frequencies_as_transformers_does(changes: dict[str, float]) -> None:
    values = LLAMA_3_1 | changes
    config = LlamaConfig(head_dim=128, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0} | values)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    length = int(values.pop("original_max_position_embeddings"))
    scaled = ScaledRope(**values, original_context_length=length)
    plain = 500000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    ours = torch.tensor([frequency / scaled.divisor(frequency) for frequency in plain.tolist()])
    torch.testing.assert_close(ours, inverse, rtol=2e-6, atol=0)
    assert not torch.allclose(ours, plain.float()), "something is scaled"


def test_the_table_has_the_scaled_frequencies_and_the_divided_positions() -> None:
    options = {"head_dim": 128, "rope_theta": 500000.0, "use_scaled_rope": True}
    table = rotary_table(tiny_args(**options), 64, torch.device("cpu"))
    config = LlamaConfig(head_dim=128, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0} | LLAMA_3_1)
    inverse, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    angles = torch.outer(torch.arange(64.0), inverse)
    torch.testing.assert_close(table, torch.stack((angles.cos(), angles.sin()), dim=-1), rtol=0, atol=2e-5)
    both = rotary_table(tiny_args(**options, rope_scaling=2.0), 128, torch.device("cpu"))
    assert torch.equal(both[::2], table)
