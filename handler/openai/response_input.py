"""Owns the shape of the input and the tools of a response, and their way to what a dialog is below the server.

Knows no chat format and no reply.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Json, Tag

from handler.openai.fields import Body, Name, by_kind, only
from handler.openai.messages import AUDIO, MAX_TOOLS, Parameters, unique
from llama2.text import dialog

_STATUS = Literal["in_progress", "completed", "incomplete"]
_STORED = "nothing is stored here: send the items themselves"


class TextPart(Body):
    """Of an input, or of an output that comes back."""

    type: Annotated[Any, only("input_text", "output_text", "text", why=AUDIO)]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("objects")], by_kind("a string or a list of text parts")
]


def _joined(text: str | list[TextPart]) -> str:
    return text if isinstance(text, str) else "".join(part.text for part in text)


class MessageItem(Body):
    """A developer is what models know as system."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Text
    id: str | None = None
    status: _STATUS | None = None
    phase: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Json[dict[str, Any]]
    id: str | None = None
    status: _STATUS | None = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: str | None = None
    status: _STATUS | None = None


class StoredItem(Body):
    type: Annotated[Any, only(why=_STORED)]
    id: str


def _kind(item: Any) -> str | None:
    """A message needs no type."""
    kind = item.get("type") if isinstance(item, dict) else None
    return "message" if kind is None and isinstance(item, dict) else kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[StoredItem, Tag("item_reference")],
    Discriminator(_kind, "one_of", "must be a message, a function_call or a function_call_output"),
]
Input = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Item], Field(min_length=1), Tag("objects")],
    by_kind("a string or a list of items"),
]


def read_messages(instructions: str | None, given: str | list[Item]) -> list[dialog.Message]:
    """The dialog that instructions and input are. Calls are the assistant's, of the turn that it is in."""
    messages = [] if instructions is None else [dialog.Message(role="system", content=instructions)]
    turn: tuple[str, list[dialog.Call]] | None = None  # what the assistant has said and called, while it may call more

    def end_turn() -> None:
        nonlocal turn
        if turn is not None:
            messages.append(dialog.Message(role="assistant", content=turn[0], calls=tuple(turn[1])))
            turn = None

    for item in [MessageItem(role="user", content=given)] if isinstance(given, str) else given:
        if isinstance(item, CallItem):
            turn = turn or ("", [])
            turn[1].append(dialog.Call(id=item.call_id, name=item.name, arguments=item.arguments))
            continue
        end_turn()
        if isinstance(item, CallOutputItem):
            messages.append(dialog.Message(role="tool", content=_joined(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem):
            if item.role == "assistant":
                turn = (_joined(item.content), [])
            else:
                role = "user" if item.role == "user" else "system"
                messages.append(dialog.Message(role=role, content=_joined(item.content)))
    end_turn()
    return messages


class FunctionTool(Body):
    """Strict, if it does not say otherwise."""

    type: Annotated[Any, only("function", why="this server has no tools of its own")]
    name: Name
    description: str = ""
    parameters: Parameters = Field(default_factory=dict)
    strict: bool = True

    def typed(self) -> dialog.Tool:
        parameters = {"type": "object", "properties": {}} | self.parameters
        return dialog.Tool(name=self.name, description=self.description, parameters=parameters, strict=self.strict)


FunctionTools = Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)]


class NamedFunction(Body):
    type: Literal["function"]
    name: str


FunctionChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[NamedFunction, Tag("object")],
    by_kind("'none', 'auto', 'required' or a function's name"),
]


def typed_functions(tools: FunctionTools) -> dict[str, dialog.Tool]:
    """By name.

    Raises:
        InvalidValue: two have the same name.
    """
    return unique([tool.typed() for tool in tools], "tools[{}].name")
