"""Owns the shape of messages in a body, and their way to what a dialog is below the server.

Knows no endpoint and no chat format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError

from handler.openai.fields import Body, by_kind, only
from handler.openai.functions import Arguments
from llama2.text import dialog

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
AUDIO = "this model reads and writes text"
FUNCTIONS = "it is deprecated; use tools and tool_choice"
_NO_PLACE = "this model's prompt format has no place for {}"


class TextPart(Body):
    type: Annotated[Any, only("text", why=AUDIO)]
    text: str


P = TypeVar("P", bound=TextPart)
Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[P], Tag("objects")], by_kind("a string or a list of text parts")
]


def joined(content: str | Sequence[TextPart]) -> str:
    """The text of a content."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def typed_role(role: str) -> str:
    """A developer is what models know as system."""
    return "system" if role == "developer" else role


class Turn(Body):
    """One message."""

    content: Content[TextPart]
    name: Annotated[str, Field(pattern=r"^[^\s<|\\/>]{1,64}$")] | None = None

    @property
    def text(self) -> str:
        return joined(self.content)


class PlainMessage(Turn):
    role: Literal["system", "developer", "user"]

    def typed(self) -> dialog.Message:
        return dialog.Message(role=typed_role(self.role), content=self.text, name=self.name)


class FunctionCall(Body):
    name: str
    arguments: Arguments


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Turn):
    role: Literal["assistant"]
    content: Content[TextPart] = ""
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
    list[Annotated[PlainMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]], Field(min_length=1)
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
