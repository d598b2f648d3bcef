"""Owns the shape of the input of a response, and its way to what a dialog is below the server.

Knows no chat format and no reply.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from handler.openai.fields import Body, by_kind, only
from handler.openai.functions import Arguments
from handler.openai.messages import AUDIO, Content, TextPart, joined, typed_role
from llama2.text import dialog

_STATUS = Literal["in_progress", "completed", "incomplete"]
_STORED = "nothing is stored here: send the items themselves"


class ItemPart(TextPart):
    """Of an input, or of an output that comes back."""

    type: Annotated[Any, only("input_text", "output_text", "text", why=AUDIO)]
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] = Field(default_factory=list)


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content[ItemPart]
    id: str | None = None
    status: _STATUS | None = None
    phase: str | None = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: Arguments
    id: str | None = None
    status: _STATUS | None = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: Content[ItemPart]
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
            messages.append(dialog.Message(role="tool", content=joined(item.output), tool_call_id=item.call_id))
        elif isinstance(item, MessageItem):
            if item.role == "assistant":
                turn = (joined(item.content), [])
            else:
                messages.append(dialog.Message(role=typed_role(item.role), content=joined(item.content)))
    end_turn()
    return messages
