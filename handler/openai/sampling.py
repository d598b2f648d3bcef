"""Owns what an OpenAI body says about choosing tokens: sampling parameters, and the grammar a reply is held to.

OpenAI's defaults hold here, not those of model-config.yaml. Knows no prompt and no reply.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

from handler.errors import RequestError
from handler.openai.schema import GenerationBody, JsonObjectFormat, JsonSchemaFormat
from llama2.engine.sequence import Grammar, SamplingParams


class Grammars(Protocol):
    """What makes grammars. Each raises ValueError for what cannot be one."""

    def json_schema(self, schema: dict[str, Any]) -> Grammar: ...

    def json_object(self) -> Grammar: ...

    def regex(self, pattern: str) -> Grammar: ...

    def choice(self, texts: list[str]) -> Grammar: ...


def sampling_params(body: GenerationBody, *, max_new_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """The parameters a body asks for.

    Raises:
        RequestError: a value is out of range.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stop:
        raise RequestError("stop must not hold an empty string", param="stop", code="invalid_value")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=_or(body.temperature, 1.0),
        # Zero keeps the likeliest token alone, as the smallest number above it does.
        top_p=max(_or(body.top_p, 1.0), sys.float_info.min),
        top_k=max(_or(body.top_k, 0), 0),
        min_p=_or(body.min_p, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        seed=body.seed,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
        logit_bias=_logit_bias(body.logit_bias or {}),
    )


def grammar_maker(
    body: GenerationBody, grammars: Grammars, *, call_schema: dict[str, Any] | None = None
) -> Callable[[], Grammar] | None:
    """The way to what the reply must look like, None for anything. To go it may take a second, and may end in a
    RequestError: it cannot be followed. `call_schema` is that of a tool call which must be made.

    Raises:
        RequestError: two fields ask for it.
    """
    wanted: dict[str, Callable[[], Grammar]] = {}
    if call_schema is not None:
        wanted["tool_choice"] = lambda: grammars.json_schema(call_schema)
    if isinstance(body.response_format, (JsonObjectFormat, JsonSchemaFormat)):
        asked = body.response_format
        schema = asked.json_schema.schema_ if isinstance(asked, JsonSchemaFormat) else None
        wanted["response_format"] = lambda: grammars.json_object() if schema is None else grammars.json_schema(schema)
    if (pattern := body.guided_regex) is not None:
        wanted["guided_regex"] = lambda: grammars.regex(pattern)
    if (texts := body.guided_choice) is not None:
        wanted["guided_choice"] = lambda: grammars.choice(texts)
    if not wanted:
        return None
    param, *others = wanted
    if others:
        raise RequestError(f"{param} and {others[0]} cannot be combined", param=others[0], code="invalid_value")
    if body.ignore_eos:
        raise RequestError(f"ignore_eos cannot be combined with {param}", param="ignore_eos", code="invalid_value")

    def make() -> Grammar:
        try:
            return wanted[param]()
        except ValueError as error:
            raise RequestError(f"{param}: {error}", param=param, code="invalid_value") from None

    return make


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    for key in given:
        if not (key.isascii() and key.isdecimal()):
            raise RequestError(f"logit_bias must map token ids to numbers, got the key {key!r}", param="logit_bias")
    return {int(key): bias for key, bias in given.items()}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
