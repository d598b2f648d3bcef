"""Owns the fields that hold a reply to a grammar.

Knows no grammar from the inside: what makes one is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from handler.errors import RequestError
from handler.openai.fields import Body
from llama2.engine.sequence import Grammar
from llama2.errors import InvalidValue

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Grammars(Protocol):
    """What makes grammars. Each raises ValueError for what cannot be one."""

    def json_schema(self, schema: dict[str, Any]) -> Grammar: ...

    def json_object(self) -> Grammar: ...

    def regex(self, pattern: str) -> Grammar: ...

    def choice(self, texts: list[str]) -> Grammar: ...


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


class ConstraintFields(Body):
    """OpenAI's, and two of vLLM's."""

    response_format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat | None, Field(discriminator="type")] = (
        None
    )
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None

    def grammar_maker(
        self, grammars: Grammars, *, call_schema: dict[str, Any] | None, ignore_eos: bool
    ) -> Callable[[], Grammar] | None:
        """What makes the reply's grammar, None for any reply. It may take a second, and may end in a RequestError: the
        grammar cannot be followed. `call_schema` is that of a tool call which must be made.

        Raises:
            InvalidValue: two fields ask for a grammar, or one does and the reply is not to end.
        """
        wanted: dict[str, Callable[[], Grammar]] = {}
        if call_schema is not None:
            wanted["tool_choice"] = lambda: grammars.json_schema(call_schema)
        if isinstance(self.response_format, (JsonObjectFormat, JsonSchemaFormat)):
            asked = self.response_format
            schema = asked.json_schema.schema_ if isinstance(asked, JsonSchemaFormat) else None
            wanted["response_format"] = grammars.json_object if schema is None else lambda: grammars.json_schema(schema)
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
