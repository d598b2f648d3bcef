"""Owns what is served and how: a user's settings as one frozen object, or the reason why they are refused.

Knows no front end, no torch and no file: the settings are model-config.yaml's section `handler`, already parsed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from llama2.config import MODEL_ARGS_FILE, EngineConfig
from llama2.dtypes import DtypeName, read_dtype
from llama2.engine.sampling_params import SamplingParams
from llama2.errors import InvalidValue
from llama2.names import nearest
from llama2.text.chat import SpecialTags
from llama2.text.dialog import DialogTurns

Mode = Literal["text_completion", "chat"]
Truncation = Literal["error", "left"]

PATH_KEYS = ("converted_ckpt_dir", "tokenizer_path", "model_args_path", "adapters_dir")
# The first is the default.
_CHOICES = {
    "mode": get_args(Mode),
    "truncation": get_args(Truncation),
    "special_tags": get_args(SpecialTags),
    "dialog_turns": get_args(DialogTurns),
}
_ENGINE_KEYS = {field.metadata.get("key", field.name): field.name for field in dataclasses.fields(EngineConfig)}
_SAMPLING_KEYS = ("max_new_tokens", "temperature", "top_p")
_RANK_KEYS = ("tensor_parallel_size", "threads", "step_timeout")
_OTHER_KEYS = ("dtype", "max_input_token_length", "allow_runtime_lora_updating")
KEYS = {*PATH_KEYS, *_CHOICES, *_ENGINE_KEYS, *_SAMPLING_KEYS, *_RANK_KEYS, *_OTHER_KEYS}
# Slots of a server that has a folder of adapters, and does not say how many.
MAX_LORAS = 8
STEP_TIMEOUT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerConfig:
    """The settings of one service.

    `device` None means the best one available. Clients load and unload what is in `adapters_dir` only where
    `allow_runtime_lora_updating` says so. `max_input_token_length` limits the prompts that are accepted unchanged,
    and `truncation` says what happens to a longer one. `mode` is for bodies whose shape does not tell. `degree` ranks
    have `threads` OpenMP threads each; if nothing moves in them for `step_timeout` seconds, they hang.
    """

    converted_ckpt_dir: Path
    tokenizer_path: Path | None
    model_args_path: Path | None
    adapters_dir: Path | None
    device: str | None
    dtype: DtypeName | None
    mode: Mode
    max_input_token_length: int | None
    truncation: Truncation
    special_tags: SpecialTags
    dialog_turns: DialogTurns
    engine: EngineConfig
    sampling: SamplingParams
    degree: int
    threads: int
    step_timeout: int
    allow_runtime_lora_updating: bool

    @classmethod
    def read(cls, settings: Mapping[str, Any], *, base: Path, device: str | None = None) -> HandlerConfig:
        """Read settings; a key that is left out or null has its default. Paths are relative to `base`.

        Raises:
            ValueError: a key is unknown or missing, or a value is out of range.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        for key in given.keys() - KEYS:
            raise ValueError(f"unknown key {key!r}; {nearest(str(key), KEYS)}")
        if "converted_ckpt_dir" not in given:
            raise ValueError("converted_ckpt_dir is missing: the folder to load the weights from")
        engine = _engine(given)
        choices: dict[str, Any] = {key: _choice(key, given.get(key, allowed[0])) for key, allowed in _CHOICES.items()}
        paths: dict[str, Any] = {key: _path(key, given[key], base) if key in given else None for key in PATH_KEYS}
        degree = positive("tensor_parallel_size", given.get("tensor_parallel_size", 1))
        return cls(
            **paths,
            **choices,
            device=device,
            dtype=read_dtype(given.get("dtype")),
            max_input_token_length=_max_input_token_length(given),
            engine=engine,
            sampling=SamplingParams(**{key: given[key] for key in _SAMPLING_KEYS if key in given}),
            degree=degree,
            threads=positive("threads", given.get("threads", max(1, len(os.sched_getaffinity(0)) // degree))),
            step_timeout=positive("step_timeout", given.get("step_timeout", STEP_TIMEOUT)),
            allow_runtime_lora_updating=_may_update_loras(given),
        ).with_engine(engine)

    def with_engine(self, engine: EngineConfig) -> HandlerConfig:
        """These settings with the engine's, as it has worked out what nobody has set.

        Raises:
            ValueError: `max_input_token_length` leaves no room for a reply.
        """
        if engine.max_seq_len is not None and (self.max_input_token_length or 0) >= engine.max_seq_len:
            raise ValueError(
                f"max_input_token_length must leave room for a reply: at most {engine.max_seq_len - 1} with "
                f"max_seq_len={engine.max_seq_len}, got {self.max_input_token_length}"
            )
        return dataclasses.replace(self, engine=engine)

    @property
    def max_input_tokens(self) -> int:
        """The longest prompt that is accepted unchanged."""
        return self.max_input_token_length or self.engine.max_seq_len - 1

    def fingerprint(self) -> str:
        """A short name for weights and settings: while it is the same, a seed gives the same reply."""
        checkpoint = self.converted_ckpt_dir
        model_args = self.model_args_path or checkpoint
        digest = hashlib.sha256(repr((self.engine, self.dtype, self.device)).encode())
        for path in (model_args / MODEL_ARGS_FILE if model_args.is_dir() else model_args, checkpoint / ".metadata"):
            digest.update(path.read_bytes())
        return f"fp_{digest.hexdigest()[:12]}"


def _engine(given: Mapping[str, Any]) -> EngineConfig:
    options = {name: given[key] for key, name in _ENGINE_KEYS.items() if key in given}
    if "adapters_dir" in given:
        options.setdefault("max_loras", MAX_LORAS)
    if "max_step_tokens" not in options and isinstance(options.get("max_batch_size"), int):
        options["max_step_tokens"] = max(EngineConfig().max_step_tokens, options["max_batch_size"])
    try:
        SamplingParams(seed=options.get("seed"))  # the same range as a request's own seed
        engine = EngineConfig(**options)
    except InvalidValue as error:
        key = next((key for key, name in _ENGINE_KEYS.items() if name == error.field), error.field)
        raise InvalidValue(key, error.problem) from None
    if "adapters_dir" in given and not engine.max_loras:
        raise InvalidValue("max_loras", "must be at least 1 with an adapters_dir, got 0")
    return engine


def _max_input_token_length(given: Mapping[str, Any]) -> int | None:
    key = "max_input_token_length"
    return positive(key, given[key]) if key in given else None


def _may_update_loras(given: Mapping[str, Any]) -> bool:
    key = "allow_runtime_lora_updating"
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
    if value and "adapters_dir" not in given:
        raise ValueError(f"{key} needs adapters_dir, the folder that clients may load adapters from")
    return value


def _path(key: str, value: Any, base: Path) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a path, got {value!r}")
    path = base / Path(value).expanduser()
    if not path.exists():
        raise ValueError(f"{key} is {value!r}, but {path} does not exist")
    return path


def _choice(key: str, value: Any) -> Any:
    if value not in _CHOICES[key]:
        raise ValueError(f"{key} must be one of {', '.join(_CHOICES[key])}, got {value}")
    return value


def positive(name: str, value: Any) -> int:
    """`value`, or a ValueError naming `name` if it is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {'null' if value is None else repr(value)}")
    return value
