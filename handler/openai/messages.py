"""Owns the shape of messages and tools in a body, and their way to what a dialog is below the server.

Knows no endpoint and no chat format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Json, Tag
from pydantic_core import PydanticCustomError

from handler.openai.fields import Body, Name, by_kind, only
from llama2.errors import InvalidValue
from llama2.text import dialog

MAX_TOOLS = 128
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
AUDIO = "this model reads and writes text"
FUNCTIONS = "it is deprecated; use tools and tool_choice"
_NO_PLACE = "this model's prompt format has no place for {}"


class TextPart(Body):
    type: Annotated[Any, only("text", why=AUDIO)]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("objects")], by_kind("a string or a list of text parts")
]


class Turn(Body):
    """One message."""

    content: Content
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class SystemMessage(Turn):
    """A developer is what models know as system."""

    role: Literal["system", "developer", "user"]

    def typed(self) -> dialog.Message:
        return dialog.Message(role="user" if self.role == "user" else "system", content=self.text, name=self.name)


class FunctionCall(Body):
    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Turn):
    role: Literal["assistant"]
    content: Content = ""
    tool_calls: list[ToolCall] = Field(default_factory=list)
    refusal: Annotated[Any, only(why=_NO_PLACE.format("refusals"))] = None
    audio: Annotated[Any, only(why=AUDIO)] = None
    function_call: Annotated[Any, only(why=FUNCTIONS)] = None
    annotations: Annotated[Any, only([], why=_NO_PLACE.format("annotations"))] = None

    def typed(self) -> dialog.Message:
        calls = [
            dialog.Call(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in self.tool_calls
        ]
        return dialog.Message(role=self.role, content=self.text, calls=tuple(calls), name=self.name)


class ToolMessage(Turn):
    role: Literal["tool"]
    tool_call_id: str

    def typed(self) -> dialog.Message:
        return dialog.Message(role=self.role, content=self.text, tool_call_id=self.tool_call_id, name=self.name)


Messages = Annotated[
    list[Annotated[SystemMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]], Field(min_length=1)
]


# What a template is given anyway.
_RESERVED = {
    "messages",
    "conversations",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "add_generation_prompt",
}
_RESERVED |= {"continue_final_message", "return_assistant_tokens_mask"}
_WORD = re.compile(r"[\w.-]{1,64}", re.ASCII)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A text of any kind could spell what controls a model."""
    for name, value in kwargs.items():
        if name in _RESERVED:
            raise PydanticCustomError("value", "must not set {name}", {"name": repr(name)})
        if not isinstance(value, (bool, int, float)) and not (isinstance(value, str) and _WORD.fullmatch(value)):
            raise PydanticCustomError("value", "must map names to true, false, numbers and words")
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_plain)]


def _of_objects(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("value", "must be a JSON schema of type 'object'")
    return schema


Parameters = Annotated[dict[str, Any], AfterValidator(_of_objects)]


class Function(Body):
    name: Name
    description: str = ""
    parameters: Parameters = Field(default_factory=dict)
    strict: bool = False

    def typed(self) -> dialog.Tool:
        parameters = {"type": "object", "properties": {}} | self.parameters
        return dialog.Tool(name=self.name, description=self.description, parameters=parameters, strict=self.strict)


class Tool(Body):
    type: Literal["function"]
    function: Function


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


class FunctionName(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedTool, Tag("object")],
    by_kind("'none', 'auto', 'required' or a function's name"),
]


def typed_tools(tools: Tools) -> dict[str, dialog.Tool]:
    """By name.

    Raises:
        InvalidValue: two have the same name.
    """
    return unique([tool.function.typed() for tool in tools], "tools[{}].function.name")


def unique(tools: Sequence[dialog.Tool], place: str) -> dict[str, dialog.Tool]:
    """By name. `place` is the path to a tool's name, with {} for its index.

    Raises:
        InvalidValue: two have the same name.
    """
    named: dict[str, dialog.Tool] = {}
    for index, tool in enumerate(tools):
        if tool.name in named:
            raise InvalidValue(place.format(index), f"is {tool.name!r}, which another tool has")
        named[tool.name] = tool
    return named


def forced_tools(tools: Mapping[str, dialog.Tool], choice: str, *, is_name: bool) -> list[dialog.Tool]:
    """The tools one of which the reply must call; none where it need not. `is_name`: the choice is one of them.

    Raises:
        InvalidValue: there is no such tool.
    """
    if is_name:
        if choice not in tools:
            raise InvalidValue("tool_choice", f"must name one of the tools, got {choice!r}")
        return [tools[choice]]
    if choice == "required" and not tools:
        raise InvalidValue("tool_choice", "is 'required', but there are no tools")
    return [*tools.values()] if choice == "required" else []
