"""Owns what a user writes into `model-config.yaml`: reads it into one frozen object, or refuses it in plain words.

Knows no torch and starts nothing: `build_archive.py` reads a file with it before a server ever does.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama2.config import MODEL_ARGS_FILE, EngineConfig
from llama2.engine.sequence import SamplingParams

Mode = Literal["text_completion", "chat"]

PATH_KEYS = ("converted_ckpt_dir", "tokenizer_path", "model_args_path")
_ENGINE_KEYS = (
    *("max_seq_len", "max_batch_size", "max_step_tokens", "kv_memory_fraction", "prefix_cache"),
    *("cuda_graphs", "symm_mem_all_reduce"),
)
_SAMPLING_KEYS = ("max_new_tokens", "temperature", "top_p")
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "mode": ("text_completion", "chat"),
    "dtype": (None, "bfloat16", "float16", "float32"),
    "special_tags": ("reject", "encode"),
    "truncation": ("error", "left"),
}
_HANDLER_KEYS = {*PATH_KEYS, *_ENGINE_KEYS, *_SAMPLING_KEYS, *_CHOICES, "manual_seed", "max_input_token_length"}

# What TorchServe 0.12 itself reads (org.pytorch.serve.archive.model.ModelConfig), as far as it can work here.
_TORCHSERVE_KEYS = {
    *("minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "deviceType"),
    *("deviceIds", "parallelType", "continuousBatching", "jobQueueSize", "maxRetryTimeoutInSec", "useVenv"),
    *("torchrun", "handler"),
}
_TORCHRUN_KEYS = {
    *("nproc-per-node", "nnodes", "node-rank", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf"),
    *("monitor-interval", "master-addr", "master-port", "OMP_NUMBER_THREADS"),
}
_VARIABLES = {"MAX_INPUT_TOKEN_LENGTH": "max_input_token_length", "MAX_NEW_TOKENS": "max_new_tokens"}
_POSITIVE = {"batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "jobQueueSize", "maxRetryTimeoutInSec"}
_IMPOSSIBLE = {
    "asyncCommunication": "with torchrun it leaves clients hanging",
    "clientTimeoutInMills": "a request that expires in the queue leaves its client hanging",
    "sequenceBatching": "requests are batched by continuousBatching",
    "useJobTicket": "requests are batched by continuousBatching",
    "parallelLevel": "the number of ranks is torchrun: nproc-per-node",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerConfig:
    """The settings of one worker.

    `device` None means the best one there is. `max_input_tokens` is the longest prompt that is taken as it stands;
    `truncation` says what happens to a longer one. `mode` is for bodies whose shape does not say it.
    """

    converted_ckpt_dir: Path
    tokenizer_path: Path | None
    model_args_path: Path | None
    device: str | None
    dtype: str | None
    mode: Mode
    max_input_tokens: int
    truncation: Literal["error", "left"]
    special_tags: Literal["reject", "encode"]
    engine: EngineConfig
    sampling: SamplingParams

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any], *, base: Path, environ: Mapping[str, str] | None = None
    ) -> HandlerConfig:
        """Read the parsed yaml. Relative paths are taken from `base`, the folder that the file stands for.

        `environ` may hold MAX_INPUT_TOKEN_LENGTH and MAX_NEW_TOKENS, which win over the file.

        Raises:
            ValueError: a key is unknown, missing or impossible here, or a value is out of range.
        """
        overrides = {
            key: _positive(f"environment variable {variable}", int(text) if text.isdecimal() else text)
            for variable, key in _VARIABLES.items()
            if (text := (environ or {}).get(variable, ""))
        }
        try:
            _check_torchserve(settings)
            handler = _section(settings, "handler")
            _check_keys(handler, _HANDLER_KEYS, section="handler")
            return cls._read(
                {**handler, **overrides}, base, device="cpu" if settings.get("deviceType") == "cpu" else None
            )
        except ValueError as error:
            raise ValueError(f"model-config.yaml: {error}") from None

    def fingerprint(self) -> str:
        """A short name for weights and settings: where it is the same, so is what a seed gives."""
        checkpoint = self.converted_ckpt_dir
        model_args = self.model_args_path or checkpoint
        digest = hashlib.sha256(repr((self.engine, self.dtype, self.device)).encode())
        for path in (model_args / MODEL_ARGS_FILE if model_args.is_dir() else model_args, checkpoint / ".metadata"):
            digest.update(path.read_bytes())
        return f"fp_{digest.hexdigest()[:12]}"

    @classmethod
    def _read(cls, handler: Mapping[str, Any], base: Path, device: str | None) -> HandlerConfig:
        paths = {key: _path(key, handler.get(key), base) for key in PATH_KEYS}
        checkpoint = paths["converted_ckpt_dir"]
        if checkpoint is None:
            raise ValueError("handler: converted_ckpt_dir is missing: the folder to load the weights from")
        choices: dict[str, Any] = {key: _choice(key, handler, allowed) for key, allowed in _CHOICES.items()}
        engine = _engine(handler)
        return cls(
            converted_ckpt_dir=checkpoint,
            tokenizer_path=paths["tokenizer_path"],
            model_args_path=paths["model_args_path"],
            device=device,
            max_input_tokens=_max_input_tokens(handler, engine),
            engine=engine,
            sampling=SamplingParams(**{key: handler[key] for key in _SAMPLING_KEYS if key in handler}),
            **choices,
        )


def _check_torchserve(settings: Mapping[str, Any]) -> None:
    for key, reason in _IMPOSSIBLE.items():
        if settings.get(key):
            raise ValueError(f"{key} cannot be used here: {reason}")
    _check_keys(settings, _TORCHSERVE_KEYS | set(_IMPOSSIBLE), section=None)
    for key, value in (("parallelType", "tp"), ("continuousBatching", True)):
        if settings.get(key) != value:
            raise ValueError(f"{key} must be {_yaml(value)}, got {_yaml(settings.get(key))}")
    for key in ("minWorkers", "maxWorkers", *_POSITIVE & set(settings)):
        _positive(key, settings.get(key))  # TorchServe would only log it and go on
    if settings.get("deviceType", "gpu") not in ("cpu", "gpu"):
        raise ValueError(f"deviceType must be cpu or gpu, got {_yaml(settings['deviceType'])}")
    torchrun = _section(settings, "torchrun")
    _check_keys(torchrun, _TORCHRUN_KEYS, section="torchrun")
    _positive("torchrun: nproc-per-node", torchrun.get("nproc-per-node"))


def _engine(handler: Mapping[str, Any]) -> EngineConfig:
    sizes = {key: handler[key] for key in _ENGINE_KEYS if handler.get(key) is not None}
    seed = handler.get("manual_seed")
    if seed is not None:
        SamplingParams(seed=_integer("manual_seed", seed))  # the same range as a request's own seed
    if "max_step_tokens" not in sizes and isinstance(sizes.get("max_batch_size"), int):
        sizes["max_step_tokens"] = max(EngineConfig().max_step_tokens, sizes["max_batch_size"])
    return EngineConfig(seed=seed, **sizes)


def _max_input_tokens(handler: Mapping[str, Any], engine: EngineConfig) -> int:
    longest = engine.max_seq_len - 1
    value = handler.get("max_input_token_length")
    if value is None:
        return longest
    if _positive("max_input_token_length", value) > longest:
        raise ValueError(
            f"max_input_token_length must leave room for a reply: at most {longest} with max_seq_len="
            f"{engine.max_seq_len}, got {value}"
        )
    return value


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = settings.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"the section {name}: is missing or holds no keys")
    return section


def _check_keys(section_values: Mapping[str, Any], known: set[str], *, section: str | None) -> None:
    homes: dict[str | None, set[str]] = {None: _TORCHSERVE_KEYS, "torchrun": _TORCHRUN_KEYS, "handler": _HANDLER_KEYS}
    for key in section_values:
        if key in known:
            continue
        place = f"in {section}:" if section else "at the top level"
        for other, keys in homes.items():
            if key in keys:
                home = f"under {other}:" if other else "at the top level"
                raise ValueError(f"{key!r} stands {place}, but belongs {home}")
        raise ValueError(f"unknown key {key!r} {place}; {nearest(str(key), known)}")


def nearest(name: str, known: set[str]) -> str:
    """The end of an error message about an unknown name: the likeliest one meant, or all there are."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def _path(key: str, value: Any, base: Path) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise ValueError(f"handler: {key} must be a path, got {_yaml(value)}")
    path = base / Path(value).expanduser()
    if not path.exists():
        raise ValueError(f"handler: {key} is {value!r}, but {path} does not exist")
    return path


def _choice(key: str, handler: Mapping[str, Any], allowed: tuple[str | None, ...]) -> str | None:
    value = handler.get(key, allowed[0])
    if value not in allowed:
        names = ", ".join(_yaml(choice) for choice in allowed)
        raise ValueError(f"handler: {key} must be one of {names}, got {_yaml(value)}")
    return value


def _positive(name: str, value: Any) -> int:
    if _integer(name, value) < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
    return value


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {_yaml(value)}")
    return value


def _yaml(value: Any) -> str:
    """A value as a yaml file spells it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
