"""Meta's params.json is read as Meta's code reads it, and written back to the same model."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from llama2.config import EngineConfig, ModelArgs
from tests.support.weights import meta_shape, tiny_args

LLAMA_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
LLAMA_70B = {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
    "vocab_size": -1,
}


def count(args: ModelArgs) -> int:
    return sum(math.prod(shape) for shape in args.parameter_shapes().values())


@pytest.mark.parametrize(
    ("params", "hidden_dim", "parameters"),
    [(LLAMA_7B, 11008, 6_738_415_616), (LLAMA_70B, 28672, 68_976_648_192)],
    ids=["7B", "70B"],
)
def test_the_published_models_have_the_published_sizes(
    params: dict[str, Any], hidden_dim: int, parameters: int
) -> None:
    args = ModelArgs.from_params(params, vocab_size=32000)
    assert args.hidden_dim == hidden_dim
    assert args.vocab_size == 32000
    assert count(args) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 2},
        {"ffn_dim_multiplier": 1.3},
        {"head_dim": 16},
        {"hidden_dim": 100},
        {"rope_theta": 1e6},
        {"context_length": 2048},
        {"rope_scaling": 2.0},
        {"use_scaled_rope": True},
        {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "high_freq_factor": 8.0, "rope_scaling": 2.0},
        {"use_scaled_rope": True, "rope_original_context_length": 64, "context_length": 1024},
    ],
    ids=str,
)
def test_params_and_model_args_survive_a_round_trip(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = tiny_args(**changes)
    assert ModelArgs.from_params(args.to_params()) == args
    args.save(tmp_path)
    assert ModelArgs.load(tmp_path) == args == ModelArgs.load(tmp_path / "model_args.json")


def test_a_shape_at_rest_is_a_view_of_metas() -> None:
    args = tiny_args(n_kv_heads=2)
    for name, shape in args.parameter_shapes().items():
        assert math.prod(meta_shape(name, args)) == math.prod(shape)
    assert args.parameter_shapes()["layers.0.attention.wq.weight"] == (2, 4, 8, 64)
    assert args.parameter_shapes()["layers.0.attention.wo.weight"] == (64, 2, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_hedas": 4}, "unknown key 'n_hedas'; known keys are .*n_heads"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope must be true or false, got 'yes'"),
        ({"rope_scaling_factor": 8}, "rope_scaling_factor belongs to use_scaled_rope, which is not true"),
        ({"use_scaled_rope": True, "rope_scaling_factor": "8"}, "factor must be a positive number, got '8'"),
        ({"use_scaled_rope": True, "high_freq_factor": 1}, "low_freq_factor must be less than high_freq_factor=1"),
        ({"scaled_rope": {}}, "unknown key 'scaled_rope'"),
        ({"dim": None}, "'dim' is missing"),
        ({"vocab_size": "32000"}, "vocab_size must be a positive integer, got '32000'"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier must be a positive number, got '1.3'"),
        ({"dim": 65}, "n_heads=8 does not divide dim=65"),
        ({"n_heads": "8"}, "n_heads must be a positive integer, got '8'"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads=8, got 3"),
        ({"head_dim": 7}, r"head_dim must be even \(rotary embedding turns pairs\), got 7"),
        ({"norm_eps": 0}, "norm_eps must be a positive number, got 0"),
        ({"vocab_size": -1}, "vocab_size is -1 or missing, and no tokenizer"),
    ],
    ids=str,
)
def test_a_wrong_params_file_is_refused_with_its_fault_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_args(**changes)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 96, but the tokenizer has 97"):
        ModelArgs.from_params(tiny_args().to_params(), vocab_size=97)


def test_model_args_of_a_version_before_scaled_rope_are_read(tmp_path: Path) -> None:
    tiny_args().save(tmp_path)
    values = json.loads((tmp_path / "model_args.json").read_text())
    del values["scaled_rope"]
    (tmp_path / "model_args.json").write_text(json.dumps(values))
    assert ModelArgs.load(tmp_path) == tiny_args()


@pytest.mark.parametrize("text", ["{", '{"dim": 4}', '{"dim": 4, "wrong": 1}', "[]"])
def test_a_damaged_model_args_file_is_refused_in_plain_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_args.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not a model_args\.json of this project"):
        ModelArgs.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seq_len": 0}, "max_seq_len must be a positive integer, got 0"),
        ({"max_batch_size": 600}, "max_step_tokens must be at least max_batch_size=600, got 512"),
        ({"rope_scaling": 0.5}, "rope_scaling must be a number of at least 1, got 0.5"),
        ({"max_sequence_length": 5}, "max_sequence_length is an unknown name: did you mean 'max_seq_len'"),
        ({"kv_memory_fraction": 1.5}, r"kv_memory_fraction must be in \(0, 1\], got 1.5"),
        ({"kv_memory_fraction": "much"}, r"kv_memory_fraction must be in \(0, 1\], got 'much'"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be auto, int8 or fp8, got 'int4'"),
        ({"kv_cache_dtype": 8}, "kv_cache_dtype must be auto, int8 or fp8, got 8"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
    ],
    ids=str,
)
def test_an_impossible_engine_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**changes)


def test_every_option_says_what_it_is_for() -> None:
    for field in dataclasses.fields(EngineConfig):
        assert field.metadata["help"], field.name


@pytest.mark.parametrize(
    ("params", "length"),
    [
        ({}, 4096),
        ({"rope_theta": 1_000_000.0}, 16384),  # Code Llama
        ({"rope_theta": 500_000.0}, 8192),  # Llama 3
        ({"rope_theta": 500_000.0, "use_scaled_rope": True}, 131072),  # Llama 3.1
        ({"rope_theta": 12_345.0}, 4096),
        ({"rope_theta": 1_000_000.0, "context_length": 2048}, 2048),
    ],
    ids=str,
)
def test_what_a_model_was_trained_for_follows_from_its_rope_unless_it_says(params: dict[str, Any], length: int) -> None:
    args = tiny_args(**params)
    assert args.context_length == length
    assert EngineConfig().for_model(args).max_seq_len == length


def test_a_longer_sequence_needs_rope_scaling() -> None:
    args = tiny_args()
    assert EngineConfig(max_seq_len=4096).for_model(args).max_seq_len == 4096
    with pytest.raises(ValueError, match=r"max_seq_len must be at most 4096, .* got 4097: rope_scaling=2 would"):
        EngineConfig(max_seq_len=4097).for_model(args)
    assert EngineConfig(max_seq_len=8192, rope_scaling=2).for_model(args).max_seq_len == 8192
    assert EngineConfig(rope_scaling=1.5).for_model(args).max_seq_len == 6144
