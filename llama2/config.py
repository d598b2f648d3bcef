"""Owns the two settings objects: the architecture of a model and the sizes of an engine.

Knows no torch: a settings file can be read and refused without importing it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from llama2.errors import InvalidValue, shown
from llama2.names import SECOND_NAME, by_name
from llama2.rope import PARAMS_KEYS, ScaledRope, trained_length

MODEL_ARGS_FILE = "model_args.json"
KV_CACHE_DTYPES = ("auto", "int8", "fp8")
ACTIVATION_DTYPES = ("auto", "int8")
LORA_RANK = 16  # for which there is room where nobody says how much


def _later() -> Any:
    """A field whose value is worked out where none is given."""
    return field(default=None)


class Axes(NamedTuple):
    """The logical axes of a weight's outputs and of its inputs, by name. A vector has no inputs."""

    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()


_LAYER = {
    "attention.wq": Axes(("kv_heads", "group", "head_dim"), ("dim",)),
    "attention.wk": Axes(("kv_heads", "head_dim"), ("dim",)),
    "attention.wv": Axes(("kv_heads", "head_dim"), ("dim",)),
    "attention.wo": Axes(("dim",), ("kv_heads", "group", "head_dim")),
    "feed_forward.w1": Axes(("hidden",), ("dim",)),
    "feed_forward.w2": Axes(("dim",), ("hidden",)),
    "feed_forward.w3": Axes(("hidden",), ("dim",)),
    "attention_norm": Axes(("dim",)),
    "ffn_norm": Axes(("dim",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """The architecture of a Llama model, every optional key of Meta's `params.json` resolved.

    `context_length` is how many positions it was trained for. Meta's file does not say: where nothing does, it follows
    from the rotary embedding, in which Meta's models differ (4096 for Llama 2, and where that is unknown, too).
    `rope_scaling` divides the positions (linear interpolation, arXiv:2306.15595), `scaled_rope` some frequencies.
    `multiple_of` and `ffn_dim_multiplier` are kept only so that `to_params` can write Meta's file again.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    context_length: int = _later()
    rope_scaling: float = 1.0
    scaled_rope: ScaledRope | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None

    def __post_init__(self) -> None:
        if self.context_length is None:
            object.__setattr__(self, "context_length", trained_length(self.rope_theta, self.scaled_rope))
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "multiple_of")
        for name in (*sizes, "context_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("norm_eps", "rope_theta", "rope_scaling"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads={self.n_heads}, got {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding turns pairs), got {self.head_dim}")

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.n_heads // self.n_kv_heads

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, vocab_size: int | None = None) -> ModelArgs:
        """Read Meta's `params.json`.

        `vocab_size` is the tokenizer's; Llama 2's files say -1 and mean it. The feed-forward width follows Meta's
        reference (llama/model.py): two thirds of 4 * dim, times `ffn_dim_multiplier`, rounded up to `multiple_of`.

        Raises:
            ValueError: a key is unknown, missing, of a wrong type, or disagrees with the tokenizer.
        """
        fields = {field.name for field in dataclasses.fields(cls)} - {"scaled_rope"}
        known = fields | PARAMS_KEYS
        # Run-time sizes that Meta's own scripts write beside the architecture.
        unknown = sorted(set(params) - known - {"max_seq_len", "max_batch_size"})
        if unknown:
            raise ValueError(f"params.json: unknown key {unknown[0]!r}; known keys are {', '.join(sorted(known))}")
        values = {key: params[key] for key in fields if params.get(key) is not None}
        missing = sorted({"dim", "n_layers", "n_heads"} - set(values))
        if missing:
            raise ValueError(f"params.json: {missing[0]!r} is missing")
        # What is computed with below; the rest is checked with the finished object.
        for name in ("dim", "n_heads", "multiple_of", "vocab_size"):
            value = values.get(name, 1)
            if not isinstance(value, int) or (value < 1 and (name, value) != ("vocab_size", -1)):
                raise ValueError(f"params.json: {name} must be a positive integer, got {value!r}")
        multiplier = values.get("ffn_dim_multiplier", 1.0)
        if not isinstance(multiplier, (int, float)) or not 0 < multiplier < math.inf:
            raise ValueError(f"params.json: ffn_dim_multiplier must be a positive number, got {multiplier!r}")
        if values.get("vocab_size", -1) == -1:
            if vocab_size is None:
                raise ValueError("params.json: vocab_size is -1 or missing, and no tokenizer was given to take it from")
            values["vocab_size"] = vocab_size
        elif vocab_size is not None and values["vocab_size"] < vocab_size:
            raise ValueError(f"params.json: vocab_size is {values['vocab_size']}, but the tokenizer has {vocab_size}")
        values.setdefault("n_kv_heads", values["n_heads"])
        if "head_dim" not in values:
            if values["dim"] % values["n_heads"]:
                raise ValueError(f"params.json: n_heads={values['n_heads']} does not divide dim={values['dim']}")
            values["head_dim"] = values["dim"] // values["n_heads"]
        values.setdefault(
            "hidden_dim", _ffn_width(values["dim"], values.get("multiple_of", 256), values.get("ffn_dim_multiplier"))
        )
        return cls(**values, scaled_rope=ScaledRope.from_params(params))

    def to_params(self) -> dict[str, Any]:
        """The `params.json` that `from_params` reads back to an equal object."""
        params = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        # Meta's own code knows none of these keys: they are named only where they are not what follows from the others.
        if self.scaled_rope is not None:
            params |= self.scaled_rope.to_params()
            del params["scaled_rope"]
        if self.context_length == trained_length(self.rope_theta, self.scaled_rope):
            del params["context_length"]
        if self.rope_scaling == 1.0:
            del params["rope_scaling"]
        if self.head_dim * self.n_heads == self.dim:
            del params["head_dim"]
        if self.hidden_dim == _ffn_width(self.dim, self.multiple_of, self.ffn_dim_multiplier):
            del params["hidden_dim"]
        return params

    @classmethod
    def load(cls, path: Path | str) -> ModelArgs:
        """Read `model_args.json` of a converted checkpoint (`path` is the file or the folder that holds it)."""
        path = Path(path)
        path = path / MODEL_ARGS_FILE if path.is_dir() else path
        try:
            values = dict(json.loads(path.read_text(encoding="utf-8")))
            scaled = values.pop("scaled_rope", None)
            return cls(**values, scaled_rope=scaled and ScaledRope(**scaled))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist: is this a folder that convert_checkpoints.py wrote?") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a {MODEL_ARGS_FILE} of this project: {error}") from None

    def save(self, folder: Path | str) -> None:
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (Path(folder) / MODEL_ARGS_FILE).write_text(text, encoding="utf-8")

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The logical axes that weights have."""
        return {
            "dim": self.dim,
            "kv_heads": self.n_kv_heads,
            "group": self.group_size,
            "head_dim": self.head_dim,
            "hidden": self.hidden_dim,
            "vocab": self.vocab_size,
        }

    def weight_axes(self) -> dict[str, Axes]:
        """Every weight's logical axes, by Meta's name for it, such as `layers.0.attention.wq`.

        Attention weights keep the axes that count heads, so that a cut can only fall between heads: query head h is
        head h % group of KV head h // group.
        """
        layers = {f"layers.{index}.{name}": axes for index in range(self.n_layers) for name, axes in _LAYER.items()}
        vocab, norm = Axes(("vocab",), ("dim",)), Axes(("dim",))
        return {"tok_embeddings": vocab} | layers | {"norm": norm, "output": vocab}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name (Meta's, verbatim) and its shape at rest, as plain values.

        At rest, in a converted checkpoint and as a DTensor, attention weights keep the axes that count heads:
        wq (n_kv_heads, group_size, head_dim, dim), wk and wv (n_kv_heads, head_dim, dim),
        wo (dim, n_kv_heads, group_size, head_dim). Each is a plain view of Meta's two-dimensional weight. All others
        have Meta's shapes.
        """
        sizes = self.axis_sizes
        return {
            f"{name}.weight": tuple(sizes[axis] for axis in (*axes.outputs, *axes.inputs))
            for name, axes in self.weight_axes().items()
        }


def _ffn_width(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * math.ceil(width / multiple_of)


def _option(default: Any, text: str, *, key: str | None = None, second_name: str | None = None) -> Any:
    """A field of `EngineConfig`: its `help`, and its `key` in model-config.yaml where that is not its name."""
    names = {"key": key, SECOND_NAME: second_name}
    return field(default=default, metadata={"help": text} | {what: name for what, name in names.items() if name})


@by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The options of an engine, declared here alone: the keywords of `LLM` and the keys of model-config.yaml follow.

    `max_seq_len` and `max_batch_size` are None until `load_engine` has set those that nobody has: by the model
    (`for_model`), and by the memory that it leaves.

    Raises:
        InvalidValue: an option is unknown or out of range.
    """

    max_seq_len: int = _option(
        None,
        "prompt and reply together, in tokens; none: as many as the model was trained for",
        second_name="max_model_len",
    )
    rope_scaling: float = _option(
        1.0, "for a longer max_seq_len, up to so many times what the model was trained for: positions are divided by it"
    )
    max_batch_size: int = _option(
        None,
        "sequences that are computed together, more wait their turn; none: by memory, at most 256, on a CPU 32",
        second_name="max_num_seqs",
    )
    max_step_tokens: int = _option(512, "tokens of one forward pass: longer prompts are prefilled in chunks")
    block_size: int = _option(16, "tokens in a block of the KV cache")
    kv_cache_dtype: str = _option(
        "auto",
        "keys and values in the KV cache: auto, in the model's dtype; int8 or fp8 (e4m3), in half the memory of bf16",
    )
    activation_dtype: str = _option(
        "auto",
        "what quantized weights are multiplied by on a CPU: auto, in the model's dtype; int8, rounded, with a scale "
        "for each 16 to 64 of them: faster for many sequences and long prompts, less exact",
    )
    kv_memory_fraction: float | None = _option(
        None,
        "KV cache of this fraction of the memory that loading and, on a GPU, the steps leave; none: 0.9, on a CPU 0.25 "
        "and no more than max_batch_size sequences of max_seq_len can use",
    )
    max_loras: int = _option(
        0, "adapters (LoRA) that one step can compute with, each in memory of the device; 0: the base model alone"
    )
    max_lora_rank: int | None = _option(
        None,
        "the highest rank that an adapter may have, for which each of max_loras has room; none: 16, of a server "
        "that of its adapters_dir, up to 64",
    )
    max_cpu_loras: int | None = _option(
        None, "adapters that are kept in host memory, the least recently used goes first; none: 64, at least max_loras"
    )
    prefix_cache: bool = _option(True, "prompts reuse the blocks of earlier ones that begin alike")
    cuda_graphs: bool = _option(
        True, "GPUs: steps of up to 512 tokens are recorded at the start and replayed, for some memory and seconds"
    )
    symm_mem_all_reduce: bool = _option(True, "GPUs that reach each other's memory make sums of up to 8 MiB past NCCL")
    seed: int | None = _option(
        None, "seeds the requests that bring no seed; none: different at every start", key="manual_seed"
    )

    def __post_init__(self) -> None:
        later = ("max_seq_len", "max_batch_size", "max_cpu_loras", "max_lora_rank")
        for name in (*later, "block_size", "max_step_tokens", "max_loras"):
            value, least = getattr(self, name), 0 if name == "max_loras" else 1
            if value is None and name in later:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                kind = "positive integer" if least else "whole number of at least 0"
                raise InvalidValue(name, f"must be a {kind}, got {shown(value)}")
        if self.max_batch_size is not None and self.max_step_tokens < self.max_batch_size:
            raise InvalidValue(
                "max_step_tokens", f"must be at least max_batch_size={self.max_batch_size}, got {self.max_step_tokens}"
            )
        if self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise InvalidValue(
                "max_cpu_loras", f"must be at least max_loras={self.max_loras}, got {self.max_cpu_loras}"
            )
        for name in ("prefix_cache", "cuda_graphs", "symm_mem_all_reduce"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidValue(name, f"must be true or false, got {shown(value)}")
        for name, allowed in (("kv_cache_dtype", KV_CACHE_DTYPES), ("activation_dtype", ACTIVATION_DTYPES)):
            if getattr(self, name) not in allowed:
                listed = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise InvalidValue(name, f"must be {listed}, got {shown(getattr(self, name))}")
        fraction = self.kv_memory_fraction
        if fraction is not None:
            is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
            if not is_number or not 0 < fraction <= 1:
                raise InvalidValue("kv_memory_fraction", f"must be in (0, 1], got {shown(fraction)}")
        scaling = self.rope_scaling
        if not isinstance(scaling, (int, float)) or isinstance(scaling, bool) or not 1 <= scaling < math.inf:
            raise InvalidValue("rope_scaling", f"must be a number of at least 1, got {shown(scaling)}")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise InvalidValue("seed", f"must be an integer, got {shown(self.seed)}")

    def for_model(self, args: ModelArgs) -> EngineConfig:
        """These options, with a `max_seq_len`.

        Raises:
            InvalidValue: it is more than the model was trained for, and no `rope_scaling` stretches that.
        """
        longest = int(args.context_length * self.rope_scaling)
        if self.max_seq_len is None:
            return replace(self, max_seq_len=longest)
        if self.max_seq_len > longest:
            enough = math.ceil(self.max_seq_len / args.context_length)
            raise InvalidValue(
                "max_seq_len",
                f"must be at most {longest}, for which the model was trained, got {self.max_seq_len}: rope_scaling="
                f"{enough} would stretch its positions to that, at some loss of quality",
            )
        return self

    @property
    def recorded_tokens(self) -> int:
        """Tokens of the largest pass that is worth recording: a larger one computes for longer than it launches."""
        return max(self.max_batch_size, min(self.max_step_tokens, 512))

    @property
    def blocks_per_sequence(self) -> int:
        return math.ceil(self.max_seq_len / self.block_size)
