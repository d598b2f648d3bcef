"""Owns what a dialog is: messages, tools, calls of tools, and the turns in which they come.

Knows no tokenizer and no chat format.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llama2.errors import InvalidValue, shown

DialogTurns = Literal["merge", "strict"]
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The assistant's call of a tool. `arguments` is a JSON object."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn: of the system, the user, the assistant, or a tool, which answers the call `tool_call_id`.

    `name` tells speakers of one role apart, where the chat template writes it.
    """

    role: str
    content: str
    calls: tuple[Call, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

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
        if self.name is not None:
            message["name"] = self.name
        return message


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that the assistant may call. `parameters` is the JSON schema of its arguments, an object; `strict`: no
    call may depart from it."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

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
        if message["role"] not in _ROLES:
            allowed = ", ".join(map(repr, _ROLES))
            raise InvalidValue(f"messages[{index}].role", f"must be one of {allowed}, got {shown(message['role'])}")
        if not isinstance(message["content"], str):
            raise InvalidValue(f"messages[{index}].content", f"must be a string, got {shown(message['content'])}")
        messages.append(Message(role=message["role"], content=message["content"]))
    return messages


def check_calls(messages: Sequence[Message]) -> None:
    """A call of a tool is answered by that tool before anyone else speaks, and nothing else is.

    Raises:
        InvalidValue: there is no message, or a call or an answer is alone.
    """
    if not messages:
        raise InvalidValue("messages", "must hold at least one message")
    unanswered: dict[str | None, None] = {}
    for index, message in enumerate(messages):
        if message.role == "tool":
            if message.tool_call_id not in unanswered:
                waiting = shown([*unanswered])
                raise InvalidValue(
                    f"messages[{index}].tool_call_id", f"must be one of {waiting}, got {message.tool_call_id!r}"
                )
            del unanswered[message.tool_call_id]
        elif unanswered:
            raise InvalidValue(f"messages[{index}].role", f"must be 'tool', got {message.role!r}")
        unanswered |= dict.fromkeys(call.id for call in message.calls)
    if unanswered:
        last = f"messages[{len(messages) - 1}]"
        raise InvalidValue(last, f"must be followed by the answers to the tool calls {shown([*unanswered])}")


def check_turns(messages: Sequence[Message], dialog_turns: DialogTurns) -> None:
    """For a format that takes turns: [system,] user, assistant, user, ..., user. What tools answer is a user's turn.

    With `dialog_turns="merge"`, a message may go on where one of its role has ended, and a system's may stand anywhere.

    Raises:
        InvalidValue: a role comes out of turn.
    """
    after = {"system": ["user"], "user": ["assistant"], "assistant": ["user"], "tool": ["assistant"]}
    expected, speaker = ["system", "user"], ""
    for index, message in enumerate(messages):
        role = message.role
        mergeable = role == "system" or (role, speaker) in (("user", "user"), ("assistant",) * 2, ("user", "tool"))
        if role not in (*expected, "tool") and not (mergeable and dialog_turns == "merge"):
            advice = "; join the messages of one role, or have the server do so: dialog_turns: merge"
            raise InvalidValue(
                f"messages[{index}].role",
                f"must be {' or '.join(map(repr, expected))}, got {role!r}{advice if mergeable else ''}",
            )
        if role != "system" or dialog_turns == "strict":
            expected, speaker = after[role], role
    if speaker not in ("user", "tool"):
        last = f"messages[{len(messages) - 1}].role"
        raise InvalidValue(last, f"must be 'user' in the last message, got {messages[-1].role!r}")


def merge_turns(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """What all systems said, if they did, then the other roles in turn: an empty line between texts of one role.

    The turns are objects with a role and a content.
    """
    system = [turn["content"] for turn in turns if turn["role"] == "system" and turn["content"].strip()]
    merged = [{"role": "system", "content": "\n\n".join(system)}] if system else []
    others = [turn for turn in turns if turn["role"] != "system"]
    for role, group in itertools.groupby(others, lambda turn: turn["role"]):
        merged.append({"role": role, "content": "\n\n".join(turn["content"] for turn in group)})
    return merged
