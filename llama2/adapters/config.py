"""Owns `adapter_config.json`: which modules of a model an adapter changes, and the rank and the scaling of each.

What it asks for beyond LoRA's two matrices is refused by name. Knows no torch, no weight and no name of Meta's: modules
are transformers', such as `model.layers.0.self_attn.q_proj`. Keys and their meaning: PEFT, `LoraConfig`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llama2.errors import shown
from llama2.text.tokenizer_files import read_small_json

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

# Beyond any that is trained: a damaged number shall not overflow.
_LARGEST_RANK, _LARGEST_ALPHA = 1 << 16, 1e9

# Of an adapter that names no modules, as PEFT has it for Llama and Mistral.
_DEFAULT_MODULES = ("q_proj", "v_proj")
_OWN_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "layers_to_transform", "layers_pattern", "task_type"),
)
# What says where an adapter comes from, or how it was trained. PEFT itself ignores fan_in_fan_out for linear layers.
_IGNORED = frozenset(
    {
        *("peft_version", "auto_mapping", "revision", "inference_mode", "runtime_config", "fan_in_fan_out"),
        *("megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "ensure_weight_tying",
    }
)
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "use_dora": "DoRA, which scales the sums anew, is not supported: train with use_dora=false",
        "lora_bias": "a bias beside lora_B is not supported: train with lora_bias=false",
        "modules_to_save": "modules that are trained whole are not supported: train with modules_to_save=null",
        "trainable_token_indices": "trained embeddings are not supported: train with trainable_token_indices=null",
        "layer_replication": "repeated layers are not supported: train with layer_replication=null",
        "target_parameters": "only modules are changed: train with target_modules and target_parameters=null",
        "alora_invocation_tokens": "an adapter is added to all tokens: train with alora_invocation_tokens=null",
        "use_qalora": "QA-LoRA, which pools the inputs, is not supported: train with use_qalora=false",
        "use_bdlora": "block-diagonal matrices are not supported: train with use_bdlora=null",
        "megatron_config": "Megatron's layers are not supported: train with megatron_config=null",
    }
)
# These inits subtract from the base what they put into the adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_INITS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """PEFT's `LoraConfig`, as far as it determines what is computed. Fields are by the keys of the file.

    Attributes:
        target_modules: names that a module's own name is or ends in, one regular expression that it matches whole, or
            "all-linear" for all but the head.
        rank_pattern, alpha_pattern: of r and lora_alpha for modules whose names end in what a regular expression
            matches; the first one counts.
        base_model: the file's `base_model_name_or_path`.

    Raises:
        ValueError: a value is of a wrong type or out of range; the message names it.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    task_type: str | None = "CAUSAL_LM"

    def __post_init__(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for name, rank in ranks.items():
            if type(rank) is not int or not 1 <= rank <= _LARGEST_RANK:
                raise ValueError(f"{name} must be an integer from 1 to {_LARGEST_RANK}, got {shown(rank)}")
        alphas = {"lora_alpha": self.lora_alpha}
        alphas |= {f"alpha_pattern[{key!r}]": alpha for key, alpha in self.alpha_pattern.items()}
        for name, alpha in alphas.items():
            if not _is_number(alpha):
                raise ValueError(f"{name} must be a number of at most {_LARGEST_ALPHA:g}, got {shown(alpha)}")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout <= 1:
            raise ValueError(f"lora_dropout must be in [0, 1], got {shown(self.lora_dropout)}")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora must be true or false, got {shown(self.use_rslora)}")
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern need a list as target_modules")
        for pattern in self._patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{shown(pattern)} is no regular expression: {error}") from None

    @classmethod
    def load(cls, folder: Path | str) -> AdapterConfig:
        """Read the file.

        Raises:
            ValueError: it is missing or damaged, or asks for what is not supported.
        """
        path = Path(folder) / CONFIG_FILE
        values = read_small_json(path)
        try:
            _check_supported(values)
            return cls._of(values)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> AdapterConfig:
        given = {key: values[key] for key in _OWN_KEYS if values.get(key) is not None}
        given["base_model"] = _text_or_none(values, "base_model_name_or_path")
        given["task_type"] = _text_or_none(values, "task_type")
        given["target_modules"] = _names(given.get("target_modules", list(_DEFAULT_MODULES)), "target_modules")
        given["exclude_modules"] = _names(given.get("exclude_modules", []), "exclude_modules")
        patterns = given.get("layers_pattern", [])
        patterns = _names([patterns] if isinstance(patterns, str) else patterns, "layers_pattern")
        given["layers_pattern"] = tuple(pattern for pattern in patterns if pattern)
        layers = given.get("layers_to_transform", [])
        layers = layers if isinstance(layers, list) else [layers]
        if not all(type(layer) is int for layer in layers):
            raise ValueError(f"layers_to_transform must be an integer or a list of integers, got {shown(layers)}")
        given["layers_to_transform"] = tuple(layers)
        for key in ("rank_pattern", "alpha_pattern"):
            if not isinstance(given.get(key, {}), dict):
                raise ValueError(f"{key} must be an object, got {shown(given[key])}")
        return cls(**given)

    def save(self, folder: Path | str) -> None:
        """Write the file, as PEFT reads it."""

        def as_json(names: tuple[Any, ...] | str) -> list[Any] | str | None:
            return names if isinstance(names, str) else list(names) or None

        values = {
            "peft_type": "LORA",
            "task_type": self.task_type,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "target_modules": as_json(self.target_modules),
            "exclude_modules": as_json(self.exclude_modules),
            "layers_to_transform": as_json(self.layers_to_transform),
            "layers_pattern": as_json(self.layers_pattern),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "use_dora": False,
        }
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def matches(self, module: str, *, linear: bool = True) -> bool:
        """Is this one of the modules that it changes? `linear`: "all-linear" counts it (PEFT: not the head)."""
        if isinstance(self.exclude_modules, str):
            if re.fullmatch(self.exclude_modules, module):
                return False
        elif _ends_in(module, self.exclude_modules):
            return False
        targets = self.target_modules
        if isinstance(targets, str):
            return linear if targets.lower() == ALL_LINEAR else re.fullmatch(targets, module) is not None
        # A module that is named in full counts in every layer.
        if module in targets:
            return True
        return _ends_in(module, targets) and (not self.layers_to_transform or self._is_in_a_layer(module))

    @property
    def highest_rank(self) -> int:
        """That it may have anywhere."""
        return max(self.r, *self.rank_pattern.values()) if self.rank_pattern else self.r

    def rank(self, module: str) -> int:
        """Of one that it changes."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling(self, module: str) -> float:
        """What the product of the matrices of one that it changes is multiplied by."""
        rank = self.rank(module)
        alpha = _first_match(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _is_in_a_layer(self, module: str) -> bool:
        """Is its layer's number, the first in its name, one of `layers_to_transform`?"""
        befores = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        matches = (re.match(rf"{before}\.(?P<idx>\d+)\.", module) for before in befores)
        found = next((match["idx"] for match in matches if match), None)
        return found is not None and int(found) in self.layers_to_transform

    def _patterns(self) -> Iterator[str]:
        for names in (self.target_modules, self.exclude_modules):
            if isinstance(names, str):
                yield names
        yield from self.layers_pattern
        yield from self.rank_pattern
        yield from self.alpha_pattern


def _check_supported(values: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that asks for something else than two matrices beside a weight."""
    kind = values.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type must be LORA, the only kind of adapter that is supported, got {shown(kind)}")
    for key, sentence in _REFUSED.items():
        if values.get(key):
            raise ValueError(f"{key}={shown(values[key])}: {sentence}")
    if values.get("bias", "none") not in ("none", None):
        raise ValueError(f"bias={shown(values['bias'])}: trained biases are not supported: train with bias=none")
    init = values.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={shown(init)} changes the base's weights: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which makes one for the base as it was"
        )
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)):
        raise ValueError(f"init_lora_weights={shown(init)} is not supported, only true, false, {', '.join(_INITS)}")
    known = {*_OWN_KEYS, *_IGNORED, *_REFUSED, "peft_type", "base_model_name_or_path", "bias", "init_lora_weights"}
    for key in sorted(values.keys() - known):
        # What is off in a file of another version of PEFT changes nothing.
        if values[key] not in (None, False, [], {}):
            raise ValueError(f"{key[:100]}={shown(values[key])} is unknown, and may change what is computed")


def _ends_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _names(value: Any, key: str) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a string or a list of strings, got {shown(value)}")
    return tuple(value)


def _text_or_none(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} must be a string, got {shown(value)}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_ALPHA
