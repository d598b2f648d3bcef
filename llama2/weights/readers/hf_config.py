"""Owns `config.json` of a Hugging Face folder: the architecture that it describes, and how ours is described in it.

What our architecture cannot express is refused for what the config says, whoever's model it is. Knows no tensor. Keys:
transformers, `LlamaConfig` and `MistralConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.config import ModelArgs
from llama2.rope import ScaledRope
from llama2.text.tokenizer_files import read_small_json

CONFIG_FILE = "config.json"

# What transformers takes where a config does not say it.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_BIASES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")
_OTHER_NORMS = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceConfig:
    """What a `config.json` says, of a model that our architecture can express.

    `tied`: the embedding is the head, too. `quantization`: how the weights are quantized, in the config's own words;
    None: they are not.
    """

    args: ModelArgs
    tied: bool
    quantization: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> HuggingFaceConfig:
        """Read the file.

        Raises:
            ValueError: it is damaged, or describes something else.
        """
        config = read_small_json(path)
        try:
            return cls._of(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, config: Mapping[str, Any]) -> HuggingFaceConfig:
        for feature in _inexpressible(config):
            raise ValueError(f"{feature} is not supported")
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in _DEFAULTS:
            raise ValueError(f"model_type must be {' or '.join(_DEFAULTS)}, got {kind!r}")
        values = {**_DEFAULTS[kind], **config}
        dim, n_heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
        # Vicuna and LongChat say here how far their positions were stretched.
        stretched = values.get("max_sequence_length") is not None
        length = _size(values, "max_sequence_length" if stretched else "max_position_embeddings")
        if values.get("sliding_window") is not None and values.get("use_sliding_window", True):
            window = _size(values, "sliding_window")
            if window < length:
                raise ValueError(f"a sliding window (sliding_window={window}, of {length} positions) is not supported")
        quantization = config.get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise ValueError(f"quantization_config must be an object, got {quantization!r}")
        args = ModelArgs(
            dim=dim,
            n_layers=_size(values, "num_hidden_layers"),
            n_heads=n_heads,
            n_kv_heads=_size(values, "num_key_value_heads", n_heads),
            head_dim=_size(values, "head_dim", dim // n_heads),
            hidden_dim=_size(values, "intermediate_size"),
            vocab_size=_size(values, "vocab_size"),
            norm_eps=values.get("rms_norm_eps", 1e-6),
            context_length=length,
            **_read_rope(values),
        )
        return cls(args=args, tied=config.get("tie_word_embeddings") is True, quantization=quantization)


def describe(args: ModelArgs, *, dtype: str, tied: bool) -> dict[str, Any]:
    """The `config.json` of a model with plain weights of `dtype`, such as "bfloat16", as all versions read it.

    Raises:
        ValueError: the rotary embedding is scaled in two ways, for which it has no words.
    """
    if args.scaled_rope is not None and args.rope_scaling != 1.0:
        raise ValueError(
            f"Hugging Face's config has no words for rope_scaling={args.rope_scaling} beside Llama 3.1's scaling"
        )
    scaling: dict[str, Any] | None = None
    if args.rope_scaling != 1.0:
        scaling = {"rope_type": "linear", "factor": args.rope_scaling}
    if (scaled := args.scaled_rope) is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": scaled.factor,
            "low_freq_factor": scaled.low_freq_factor,
            "high_freq_factor": scaled.high_freq_factor,
            "original_max_position_embeddings": scaled.original_context_length,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "max_position_embeddings": args.context_length,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }


def _inexpressible(config: Mapping[str, Any]) -> Iterator[str]:
    """What the architecture does not have, by the keys that ask for it."""
    for key in _EXPERTS:
        if config.get(key):
            yield f"a mixture of experts ({key}={config[key]!r})"
    for key in _BIASES:
        if config.get(key):
            yield f"a bias beside the weights ({key}={config[key]!r})"
    for key in _OTHER_NORMS:
        if config.get(key) is not None:
            yield f"another norm than RMSNorm ({key}={config[key]!r})"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"another activation than SiLU (hidden_act={config['hidden_act']!r})"
    if config.get("partial_rotary_factor") not in (None, 1.0):
        yield f"a partly rotated head (partial_rotary_factor={config['partial_rotary_factor']!r})"


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelArgs` that describe the rotary embedding."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} must be an object, got {rope!r}")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"a rotary embedding for each kind of layer ({key}) is not supported")
    for feature in _inexpressible({name: rope.get(name) for name in ("partial_rotary_factor",)}):
        raise ValueError(f"{feature} is not supported")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind == "linear":
        return {"rope_theta": theta, "rope_scaling": _given(rope, "factor", key)}
    if kind == "llama3":
        scaled = ScaledRope(
            factor=_given(rope, "factor", key),
            low_freq_factor=_given(rope, "low_freq_factor", key),
            high_freq_factor=_given(rope, "high_freq_factor", key),
            original_context_length=rope.get("original_max_position_embeddings", config["max_position_embeddings"]),
        )
        return {"rope_theta": theta, "scaled_rope": scaled}
    raise ValueError(f"a rotary embedding of type {kind!r} ({key}) is not supported, only default, linear and llama3")


def _given(rope: Mapping[str, Any], name: str, key: str) -> Any:
    if name not in rope:
        raise ValueError(f"{key} has no {name!r}")
    return rope[name]


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{key!r} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value
