"""Owns the shape of functions that a body offers, and of the choice among them, in chats and in responses.

Knows no endpoint, and no format in which a model is told of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, Json, Tag
from pydantic_core import PydanticCustomError

from handler.openai.constraints import Calls
from handler.openai.fields import Body, Name, by_kind, only
from llama2.errors import InvalidValue
from llama2.text import dialog

MAX_TOOLS = 128

Arguments = Json[dict[str, Any]]


def _of_objects(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise PydanticCustomError("value", "must be a JSON schema of type 'object'")
    return schema


class Function(Body):
    name: Name
    description: str = ""
    parameters: Annotated[dict[str, Any], AfterValidator(_of_objects)] = Field(default_factory=dict)
    strict: bool = False

    def typed(self) -> dialog.Tool:
        parameters = {"type": "object", "properties": {}} | self.parameters
        return dialog.Tool(name=self.name, description=self.description, parameters=parameters, strict=self.strict)


class Tool(Body):
    """As a chat has it."""

    type: Literal["function"]
    function: Function


class _FunctionType(Body):
    type: Annotated[Any, only("function", why="this server has no tools of its own")]


class FunctionTool(Function, _FunctionType):  # a wrong type is found before what it lacks as a function
    """As a response has it: strict, if it does not say otherwise."""

    strict: bool = True


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
FunctionTools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """As a chat has it."""

    type: Literal["function"]
    function: FunctionName

    @property
    def name(self) -> str:
        return self.function.name


class NamedFunction(Body):
    """As a response has it."""

    type: Literal["function"]
    name: str


_Word = Annotated[Literal["none", "auto", "required"], Tag("text")]
_EITHER = by_kind("'none', 'auto', 'required' or a function's name")

ToolChoice = Annotated[_Word | Annotated[NamedTool, Tag("object")], _EITHER]
FunctionChoice = Annotated[_Word | Annotated[NamedFunction, Tag("object")], _EITHER]


def typed_tools(tools: Sequence[Tool]) -> list[dialog.Tool]:
    """Raises InvalidValue: two have the same name."""
    return _distinct([tool.function.typed() for tool in tools], "tools[{}].function.name")


def typed_functions(tools: Sequence[FunctionTool]) -> list[dialog.Tool]:
    """Raises InvalidValue: two have the same name."""
    return _distinct([tool.typed() for tool in tools], "tools[{}].name")


def _distinct(tools: list[dialog.Tool], place: str) -> list[dialog.Tool]:
    """`place` is the path to a tool's name, with {} for its index."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in names:
            raise InvalidValue(place.format(index), f"is {tool.name!r}, which another tool has")
        names.add(tool.name)
    return tools


def choose(
    tools: Sequence[dialog.Tool], choice: str | NamedTool | NamedFunction, *, several: bool
) -> tuple[Sequence[dialog.Tool], Calls]:
    """The tools that the model is told of, and the calls that its reply may or must make.

    Raises:
        InvalidValue: the choice is a tool that is not there.
    """
    if choice == "none":
        return (), Calls(several=several)
    if choice == "required" and not tools:
        raise InvalidValue("tool_choice", "is 'required', but there are no tools")
    callable_ = tools
    if not isinstance(choice, str):
        callable_ = [tool for tool in tools if tool.name == choice.name]
        if not callable_:
            raise InvalidValue("tool_choice", f"must name one of the tools, got {choice.name!r}")
    return tools, Calls(tools=callable_, forced=choice != "auto", several=several)
