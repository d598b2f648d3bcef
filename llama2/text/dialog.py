"""Owns what a dialog is: messages, tools, calls of tools, and the order in which they come.

Knows no tokenizer and no chat format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama2.errors import InvalidValue, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The assistant's call of a tool. `arguments` is a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn: of the system, the user, the assistant, or a tool, which answers the call `tool_call_id`."""

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    tool_call_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As chat templates know it: the arguments of a call are an object."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the assistant may call. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def as_json(self) -> dict[str, Any]:
        """As chat templates know it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def read_messages(dialog: Any) -> list[Message]:
    """Messages that come as objects with a role and a content, and nothing else.

    Raises:
        InvalidValue: one of them is something else.
    """
    if not isinstance(dialog, Sequence) or isinstance(dialog, (str, bytes)):
        raise InvalidValue("messages", f"must be a list of messages, got {shown(dialog)}")
    messages: list[Message] = []
    for index, message in enumerate(dialog):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidValue(f"messages[{index}]", "must have a role and a content, and nothing else")
        if not isinstance(message["content"], str):
            raise InvalidValue(f"messages[{index}].content", f"must be a string, got {shown(message['content'])}")
        messages.append(Message(role=message["role"], content=message["content"]))
    return messages


def check_order(messages: Sequence[Message]) -> None:
    """[system,] user, assistant, user, ..., user; the tools answer between a call and the assistant's next turn.

    Raises:
        InvalidValue: there is no message, or a role or `tool_call_id` comes out of turn.
    """
    if not messages:
        raise InvalidValue("messages", "must hold at least one message")
    after = {"system": ["user"], "user": ["assistant"], "assistant": ["user"], "tool": ["assistant"]}
    expected = ["system", "user"]
    unanswered: dict[str, None] = {}
    for index, message in enumerate(messages):
        if message.role not in expected:
            allowed = " or ".join(map(repr, expected))
            raise InvalidValue(f"messages[{index}].role", f"must be {allowed}, got {message.role!r}")
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                raise InvalidValue(
                    f"messages[{index}].tool_call_id",
                    f"must be one of {shown([*unanswered])}, got {message.tool_call_id!r}",
                )
            del unanswered[message.tool_call_id]
        unanswered |= dict.fromkeys(call.id for call in message.calls)
        expected = ["tool"] if unanswered else after[message.role]
    last = f"messages[{len(messages) - 1}]"
    if unanswered:
        raise InvalidValue(last, f"must be followed by the answers to the tool calls {shown([*unanswered])}")
    if messages[-1].role not in ("user", "tool"):
        raise InvalidValue(f"{last}.role", f"must be 'user' in the last message, got {messages[-1].role!r}")
