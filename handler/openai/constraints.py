"""Owns the fields that say what a reply is held to: a format, vLLM's constraints, or calls of tools.

Knows no prompt and no library of grammars: it says what is to be made, and when that is done.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, Tag

from handler.errors import RequestError
from handler.openai.fields import Body, Name, by_kind, only
from llama2.engine.sequence import Grammar
from llama2.errors import InvalidValue
from llama2.text.dialog import Tool
from llama2.text.tools import ToolStream, call_schema


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


Choices = Annotated[list[str], Field(min_length=1)]
JsonOrText = Annotated[
    Annotated[str, Tag("text")] | Annotated[dict[str, Any], Tag("object")], by_kind("a JSON schema or its text")
]
_GRAMMAR = "a reply can follow a JSON schema, a pattern or a choice"


class StructuredOutputs(Body):
    """vLLM's."""

    json_: Annotated[JsonOrText | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool = False
    grammar: Annotated[Any, only(why=_GRAMMAR)] = None
    structural_tag: Annotated[Any, only(why=_GRAMMAR)] = None
    whitespace_pattern: Annotated[Any, only(why="white space is as people write JSON")] = None
    disable_any_whitespace: Annotated[Any, only(False, why="white space is as people write JSON")] = None
    disable_fallback: bool = False  # there is no other library to fall back to
    disable_additional_properties: bool = False  # where a schema does not say, there are none


def _json_schema(grammars: Grammars, schema: str | dict[str, Any]) -> Grammar:
    """Raises ValueError: it is no schema."""
    try:
        parsed = json.loads(schema) if isinstance(schema, str) else schema
    except RecursionError:
        raise ValueError("the schema is nested too deep") from None
    if not isinstance(parsed, dict):
        raise ValueError("the schema must be a JSON object")
    return grammars.json_schema(parsed)


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

    def grammar_makers(self, grammars: Grammars, *, has_format: bool) -> dict[str, Callable[[], Grammar]]:
        """By the field that asks for it. `has_format`: where no call must be made, `format_maker` has all of it."""
        if self.forced:
            return {"tool_choice": lambda: grammars.json_schema(call_schema(self.tools))}
        if not self.strict or has_format:
            return {}
        schemas = {tool.name: tool.parameters if tool.strict else {"type": "object"} for tool in self.tools}
        return {"tools": lambda: grammars.calls(schemas, several=self.several)}


class ConstraintFields(Body):
    """OpenAI's, and vLLM's, of which the last is the newest."""

    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | None, Field(discriminator="type")] = (
        None
    )
    guided_json: JsonOrText | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: Annotated[Any, only(why=_GRAMMAR)] = None
    structured_outputs: StructuredOutputs | None = None

    def grammar_maker(
        self, grammars: Grammars, *, calls: Calls, never_ends: str | None
    ) -> Callable[[], Grammar] | None:
        """What makes the reply's grammar, None for any reply. It may take a second, and may end in a RequestError: the
        grammar cannot be followed. `never_ends` is the field that keeps a reply from its end, if one does.

        Raises:
            InvalidValue: two fields ask for a grammar, or one does and another says that the reply is not to end.
        """
        wanted = calls.grammar_makers(grammars, has_format=isinstance(self.response_format, JsonSchemaFormat))
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.schema_
            wanted["response_format"] = format_maker(grammars, schema, calls)
        elif isinstance(self.response_format, JsonObjectFormat):
            wanted["response_format"] = grammars.json_object
        outputs = self.structured_outputs or StructuredOutputs()
        for place, given in (("guided_json", self.guided_json), ("structured_outputs.json", outputs.json_)):
            if given is not None:
                wanted[place] = functools.partial(_json_schema, grammars, given)
        for place, pattern in (("guided_regex", self.guided_regex), ("structured_outputs.regex", outputs.regex)):
            if pattern is not None:
                wanted[place] = functools.partial(grammars.regex, pattern)
        for place, texts in (("guided_choice", self.guided_choice), ("structured_outputs.choice", outputs.choice)):
            if texts is not None:
                wanted[place] = functools.partial(grammars.choice, texts)
        if outputs.json_object:
            wanted["structured_outputs.json_object"] = grammars.json_object
        return only_maker(wanted, never_ends=never_ends)


def format_maker(grammars: Grammars, schema: dict[str, Any] | None, calls: Calls) -> Callable[[], Grammar]:
    """For a reply that follows a schema, or is one of the calls."""
    if schema is None:
        return grammars.json_object
    if calls.tools and not calls.forced:
        schema = call_schema(calls.tools, instead=schema)
    return functools.partial(grammars.json_schema, schema)


def only_maker(wanted: Mapping[str, Callable[[], Grammar]], *, never_ends: str | None) -> Callable[[], Grammar] | None:
    """The one maker that is `wanted`, by the field that asks for it; it raises RequestError. None if none is.

    Raises:
        InvalidValue: there are two, or one and a field `never_ends`, which keeps a reply from its end.
    """
    if not wanted:
        return None
    field, *others = wanted
    if others or never_ends:
        raise InvalidValue(others[0] if others else never_ends or "", f"cannot be combined with {field}")

    def make() -> Grammar:
        try:
            return wanted[field]()
        except ValueError as error:
            raise RequestError(f"{field}: {error}", param=field, code="invalid_value") from None

    return make
