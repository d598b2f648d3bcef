"""Owns the architectures that a benchmark can build without their weights, by name.

Knows no torch. Speed does not depend on the values of weights, so random ones in these shapes measure the real models.
"""

from __future__ import annotations

from llama2.config import ModelArgs

SHAPES: dict[str, ModelArgs] = {
    "7b": ModelArgs.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 32000}),
    "13b": ModelArgs.from_params({"dim": 5120, "n_layers": 40, "n_heads": 40, "vocab_size": 32000}),
    "70b": ModelArgs.from_params(
        {
            "dim": 8192,
            "n_layers": 80,
            "n_heads": 64,
            "n_kv_heads": 8,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
            "vocab_size": 32000,
        }
    ),
    # TinyLlama's: 2.2 GB in bf16, more than any cache.
    "1b": ModelArgs.from_params(
        {"dim": 2048, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4, "hidden_dim": 5632, "vocab_size": 32000}
    ),
    # SmolLM2-135M's.
    "135m": ModelArgs.from_params(
        {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "hidden_dim": 1536, "vocab_size": 49152}
    ),
    # Of SmolLM2's size, with heads that 2, 3, 4, 6 or 12 ranks share evenly (JackFram/llama-160m).
    "160m": ModelArgs.from_params({"dim": 768, "n_layers": 12, "n_heads": 12, "hidden_dim": 3072, "vocab_size": 32000}),
    # For tests and first tries: a step takes a few milliseconds.
    "tiny": ModelArgs.from_params(
        {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "vocab_size": 512}
    ),
}


def find_shape(name: str) -> ModelArgs:
    """The architecture called `name`.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    return SHAPES[name]
