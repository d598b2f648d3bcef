"""What a config says is the architecture, and what the architecture does not have is refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2.config import ModelArgs
from llama2.rope import ScaledRope
from llama2.weights.readers.hf_config import HuggingFaceConfig, describe
from tests.support.weights import tiny_args

# As published, without what describes no architecture.
LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(folder: Path, **changes: Any) -> HuggingFaceConfig:
    config = {key: value for key, value in (LLAMA_2_7B | changes).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return HuggingFaceConfig.read(folder / "config.json")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {}),
        ({"num_key_value_heads": ..., "rope_scaling": ..., "tie_word_embeddings": ...}, {}),
        ({"num_key_value_heads": 8, "rope_theta": 1e6}, {"n_kv_heads": 8, "rope_theta": 1e6}),
        ({"head_dim": 64}, {"head_dim": 64}),
        ({"max_position_embeddings": ...}, {"context_length": 2048}),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 16384},
            {"rope_scaling": 4.0, "context_length": 16384},
        ),
        (
            {"rope_scaling": LLAMA_3_1, "rope_theta": 5e5, "max_position_embeddings": 131072},
            {"scaled_rope": ScaledRope(), "rope_theta": 5e5, "context_length": 131072},
        ),
        (
            {"rope_parameters": LLAMA_3_1 | {"factor": 32.0, "rope_theta": 5e5}, "max_position_embeddings": 131072},
            {"scaled_rope": ScaledRope(factor=32.0), "rope_theta": 5e5, "context_length": 131072},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, {"rope_theta": 1e5}),
        ({"model_type": "mistral", "sliding_window": None, "num_key_value_heads": ...}, {"n_kv_heads": 8}),
        ({"model_type": "mistral", "sliding_window": 4096}, {}),
        ({"model_type": "mistral", "sliding_window": 512, "use_sliding_window": False}, {}),
    ],
    ids=str,
)
def test_an_architecture_is_what_the_config_says(
    tmp_path: Path, changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    fields: dict[str, Any] = {
        "dim": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "head_dim": 128,
        "hidden_dim": 11008,
    }
    fields |= {"vocab_size": 32000, "norm_eps": 1e-5, "context_length": 4096}
    assert read(tmp_path, **changes).args == ModelArgs(**(fields | expected))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"model_type": "mistral", "sliding_window": 1024},
            "a sliding window (sliding_window=1024, of 4096 positions)",
        ),
        (
            {"model_type": "mistral", "max_position_embeddings": 32768},
            "a sliding window (sliding_window=4096, of 32768",
        ),
        ({"attention_bias": True}, "a bias beside the weights (attention_bias=True) is not supported"),
        ({"mlp_bias": True}, "a bias beside the weights (mlp_bias=True) is not supported"),
        ({"layer_norm_eps": 1e-5}, "another norm than RMSNorm (layer_norm_eps=1e-05) is not supported"),
        ({"hidden_act": "gelu"}, "another activation than SiLU (hidden_act='gelu') is not supported"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "a mixture of experts (num_local_experts=8) is not"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "a rotary embedding of type 'yarn' (rope_scaling) is not"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "of type 'dynamic' (rope_scaling) is not supported, only",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "of type 'longrope' (rope_parameters) is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for each kind of layer (rope_parameters)"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling must be a positive number, got '4'"),
        ({"rope_scaling": LLAMA_3_1 | {"factor": 0}}, "factor must be a positive number, got 0"),
        ({"rope_scaling": [4]}, "rope_scaling must be an object, got [4]"),
        ({"rope_theta": -1}, "rope_theta must be a positive number, got -1"),
        ({"partial_rotary_factor": 0.5}, "a partly rotated head (partial_rotary_factor=0.5) is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "a partly rotated head (partial_rotary_factor=0.5) is not supported",
        ),
        ({"model_type": "qwen2"}, "model_type must be llama or mistral, got 'qwen2'"),
        ({"model_type": ...}, "model_type must be llama or mistral, got None"),
        ({"model_type": ["llama"]}, "model_type must be llama or mistral, got ['llama']"),
        ({"hidden_size": ...}, "'hidden_size' is missing"),
        ({"hidden_size": "4096"}, "hidden_size must be a positive integer, got '4096'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"num_key_value_heads": 5}, "n_kv_heads must divide n_heads=32, got 5"),
        ({"rms_norm_eps": None}, "norm_eps must be a positive number, got None"),
        ({"quantization_config": 4}, "quantization_config must be an object, got 4"),
    ],
    ids=str,
)
def test_what_the_architecture_does_not_have_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (17 << 20)], ids=len)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json [^\n]*$"):
        HuggingFaceConfig.read(tmp_path / "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 16, "rope_theta": 1e6, "norm_eps": 1e-6},
        {"rope_scaling": 4.0},
        {"use_scaled_rope": True, "rope_scaling_factor": 32.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_description_is_read_back(tmp_path: Path, changes: dict[str, Any], tied: bool) -> None:
    args = tiny_args(**changes)
    (tmp_path / "config.json").write_text(json.dumps(describe(args, dtype="bfloat16", tied=tied)))
    config = HuggingFaceConfig.read(tmp_path / "config.json")
    assert (config.tied, config.quantization) == (tied, None)
    assert config.args == replace(args, multiple_of=256), "which is Meta's own, and has no words"


def test_two_scalings_at_once_have_no_words() -> None:
    with pytest.raises(ValueError, match=r"no words for rope_scaling=2\.0 beside Llama 3\.1's scaling"):
        describe(tiny_args(use_scaled_rope=True, rope_scaling=2.0), dtype="float32", tied=False)
