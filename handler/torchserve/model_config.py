"""Owns `model-config.yaml` as TorchServe reads it: its own keys, and the environment's overrides.

Knows no key of the section `handler`. Starts nothing: `build_archive.py` checks a file with it before a server does.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from handler.config import KEYS, HandlerConfig, positive
from llama2.errors import shown
from llama2.names import nearest

# What TorchServe 0.12 itself reads (org.pytorch.serve.archive.model.ModelConfig), as far as it can work here.
_POSITIVE = {"batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "jobQueueSize", "maxRetryTimeoutInSec"}
_REQUIRED = {"minWorkers", "maxWorkers"}
_OWN_RANKS = (
    "the worker starts its ranks itself, with no store that other hosts can reach; how many they are is "
    "tensor_parallel_size under handler:"
)
_IMPOSSIBLE = {
    "asyncCommunication": "it leaves clients hanging when a worker dies",
    "clientTimeoutInMills": "a request that expires in the queue leaves its client hanging",
    "sequenceBatching": "requests are batched by continuousBatching",
    "useJobTicket": "requests are batched by continuousBatching",
    "deviceIds": "which GPUs are used is said by CUDA_VISIBLE_DEVICES, or LLAMA_VISIBLE_DEVICES for torchserve --start",
    **dict.fromkeys(("parallelType", "parallelLevel", "torchrun"), _OWN_RANKS),
}
_SECTIONS: dict[str, Collection[str]] = {
    "": {
        *_POSITIVE,
        *_REQUIRED,
        *_IMPOSSIBLE,
        *("deviceType", "continuousBatching", "useVenv", "handler"),
    },
    "handler": KEYS,
}
_VARIABLES = {"MAX_INPUT_TOKEN_LENGTH": "max_input_token_length", "MAX_NEW_TOKENS": "max_new_tokens"}


def read_model_config(
    settings: Mapping[str, Any],
    *,
    base: Path,
    environ: Mapping[str, str] | None = None,
    file: str = "model-config.yaml",
) -> HandlerConfig:
    """Read the parsed yaml. Relative paths are taken from `base`, the folder that the file stands for; errors call
    it `file`.

    `environ` may hold MAX_INPUT_TOKEN_LENGTH and MAX_NEW_TOKENS, which win over the file.

    Raises:
        ValueError: a key is unknown, missing or impossible here, or a value is out of range.
    """
    overrides = {
        key: positive(f"environment variable {variable}", int(text) if text.isdecimal() else text)
        for variable, key in _VARIABLES.items()
        if (text := (environ or {}).get(variable, ""))
    }
    try:
        _check(settings)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    try:
        device = "cpu" if settings.get("deviceType") == "cpu" else None
        return HandlerConfig.read({**settings["handler"], **overrides}, base=base, device=device)
    except ValueError as error:
        raise ValueError(f"{file}: handler: {error}") from None


def _check(settings: Mapping[str, Any]) -> None:
    for key, reason in _IMPOSSIBLE.items():
        if settings.get(key):
            raise ValueError(f"{key} cannot be used here: {reason}")
    for name in _SECTIONS:
        section = settings.get(name) if name else settings
        if not isinstance(section, Mapping):
            raise ValueError(f"the section {name}: is missing or holds no keys")
        for key in section:
            _check_key(str(key), name)
    if settings.get("continuousBatching") is not True:
        raise ValueError(f"continuousBatching must be true, got {str(settings.get('continuousBatching')).lower()}")
    if settings.get("deviceType", "gpu") not in ("cpu", "gpu"):
        raise ValueError(f"deviceType must be cpu or gpu, got {settings['deviceType']}")
    for key in _POSITIVE & set(settings):
        positive(key, settings.get(key))  # TorchServe would only log it and go on
    for key in _REQUIRED:
        if settings.get(key) != 1:
            raise ValueError(
                f"{key} must be 1, got {shown(settings.get(key))}: the ranks of one worker take all the GPUs that they "
                "see; several servers, each with its own GPUs and ports, are what several workers would be"
            )


def _check_key(key: str, section: str) -> None:
    def place(name: str) -> str:
        return f"under {name}:" if name else "at the top level"

    if key not in _SECTIONS[section]:
        for other, keys in _SECTIONS.items():
            if key in keys:
                raise ValueError(f"{key!r} stands {place(section)}, but belongs {place(other)}")
        raise ValueError(f"unknown key {key!r} {place(section)}; {nearest(key, _SECTIONS[section])}")
