"""Owns the fields that say how tokens are chosen: sampling parameters, and the grammar that a reply is held to.

OpenAI's defaults hold here, not those of model-config.yaml. Knows no prompt and no reply.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError

from handler.errors import RequestError
from handler.openai.fields import Body, Name, TokenId, by_kind, only
from llama2.engine.sequence import MAX_INT, Grammar, SamplingParams
from llama2.errors import InvalidValue
from llama2.text.dialog import Tool
from llama2.text.tools import ToolStream, call_schema


def _ids_as_keys(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal()):
            raise PydanticCustomError("value", "must map token ids to numbers, got the key {key}", {"key": repr(key)})
    return biases


Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Tag("texts")], by_kind("a string or a list of strings")
]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_ids_as_keys)]


class SamplingFields(Body):
    """vLLM's extras last."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stop: Stops = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0

    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    skip_special_tokens: Annotated[Any, only(True, why="special tokens are never part of a reply's text")] = True

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def sampling_params(self, *, max_new_tokens: int | None, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            # Zero keeps the likeliest token alone, as the smallest number above it does.
            top_p=max(self.top_p, sys.float_info.min),
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=self.biases,
        )


class Grammars(Protocol):
    """What makes grammars. Each raises ValueError for what cannot be one."""

    def json_schema(self, schema: dict[str, Any]) -> Grammar: ...

    def json_object(self) -> Grammar: ...

    def regex(self, pattern: str) -> Grammar: ...

    def choice(self, texts: list[str]) -> Grammar: ...

    def calls(self, schemas: Mapping[str, Mapping[str, Any]], *, several: bool) -> Grammar: ...


class JsonSchema(Body):
    name: Name
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """The tools that a reply may call; `forced`: it must call one of them. `several`: it may call more than one."""

    tools: Sequence[Tool] = ()
    forced: bool = False
    several: bool = True

    @property
    def strict(self) -> bool:
        """Is a reply to be held to the schemas from the moment it begins a call?"""
        return not self.forced and any(tool.strict for tool in self.tools)

    def stream(self) -> ToolStream:
        """What reads calls out of one reply."""
        return ToolStream({tool.name for tool in self.tools}, forced=self.forced, strict=self.strict)

    def grammar_maker(self, grammars: Grammars) -> Callable[[], Grammar]:
        schemas = {tool.name: tool.parameters if tool.strict else {"type": "object"} for tool in self.tools}
        return lambda: grammars.calls(schemas, several=self.several)


class ConstraintFields(Body):
    """OpenAI's, and two of vLLM's."""

    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | None, Field(discriminator="type")] = (
        None
    )
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None

    def grammar_maker(self, grammars: Grammars, *, calls: Calls, ignore_eos: bool) -> Callable[[], Grammar] | None:
        """What makes the reply's grammar, None for any reply. It may take a second, and may end in a RequestError: the
        grammar cannot be followed.

        Raises:
            InvalidValue: two fields ask for a grammar, or one does and the reply is not to end.
        """
        wanted: dict[str, Callable[[], Grammar]] = {}
        if calls.forced:
            wanted["tool_choice"] = lambda: grammars.json_schema(call_schema(calls.tools))
        if isinstance(self.response_format, (JsonObjectFormat, JsonSchemaFormat)):
            asked = self.response_format
            schema = asked.json_schema.schema_ if isinstance(asked, JsonSchemaFormat) else None
            if schema is None:
                wanted["response_format"] = grammars.json_object
            elif calls.tools and not calls.forced:
                wanted["response_format"] = lambda: grammars.json_schema(call_schema(calls.tools, instead=schema))
            else:
                wanted["response_format"] = lambda: grammars.json_schema(schema)
        elif calls.strict:
            wanted["tools"] = calls.grammar_maker(grammars)
        if (pattern := self.guided_regex) is not None:
            wanted["guided_regex"] = lambda: grammars.regex(pattern)
        if (texts := self.guided_choice) is not None:
            wanted["guided_choice"] = lambda: grammars.choice(texts)
        if not wanted:
            return None
        field, *others = wanted
        if others or ignore_eos:
            raise InvalidValue(others[0] if others else "ignore_eos", f"cannot be combined with {field}")

        def make() -> Grammar:
            try:
                return wanted[field]()
            except ValueError as error:
                raise RequestError(f"{field}: {error}", param=field, code="invalid_value") from None

        return make
