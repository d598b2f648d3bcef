"""Owns calls of tools in a reply: the JSON schema of a call that must be made, and how calls are read out of the text.

Knows no prompt, no HTTP and no torch. What is read here was written by a model: a reply that is not a call of a tool
that was given is content.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llama2.text.call_grammar import call_start
from llama2.text.dialog import Tool
from llama2.text.tool_prompt import CALL_TAG, END_CALL_TAG

# The fields of a call; Llama 3 calls the arguments parameters.
_CALL_FIELDS = ("name", "arguments", "parameters", "type")
_OPENING = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_ENDING = re.compile(r"\s*\}?\s*\Z")


def call_schema(tools: Sequence[Tool], *, instead: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON schema of a reply that calls one of the tools, or is what the schema `instead` says."""
    calls: list[dict[str, Any]] = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.name},
                # With an id of its own, a reference inside the parameters goes to the parameters.
                "arguments": {"$id": tool.name, **tool.parameters},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    if instead is not None:
        calls.insert(0, {"$id": "reply.json", **instead})
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """News of the `index`-th call of a reply. The first of a call has its id and name; `arguments` add up to JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolDelta:
    """What a piece of a reply turned out to be. Either may be empty."""

    content: str = ""
    calls: tuple[CallDelta, ...] = ()


class ToolStream:
    """Reads one reply as it grows: content or calls of tools.

    A reply is calls if the whole of it is `{"name": ..., "arguments": {...}}` with the name of a tool, or a list of
    such objects, or such objects in <tool_call> tags. It is held back as long as it can be that, and flows at once when
    it cannot. A forced call needs no proof: its arguments flow as they come. With `strict` tools a call begins as
    `call_grammar` has it, and nothing else is one: the arguments of each were held to their schema.

    `calls` is the number of calls so far. A reply with any has the finish_reason "tool_calls", unless it was cut.
    """

    def __init__(self, names: Collection[str], *, forced: bool = False, strict: bool = False) -> None:
        """`names`: the tools that may be called; without any, all is content."""
        self.calls = 0
        self._names = names
        self._forced = forced
        self._strict = strict
        self._arguments = ""  # of a forced call, so far
        self._held = ""
        self._decided: Literal["content", "call"] | None = None if names else "content"

    def push(self, text: str) -> ToolDelta:
        """Take the next piece of the reply; returns what is certain now."""
        self._held += text
        if self._decided == "content":
            return self._as_content()
        if self._forced:
            return self._as_arguments()
        if self._decided is None:
            self._decided = _look(self._held, self._names)
        return self._as_content() if self._decided == "content" else ToolDelta()

    def finish(self) -> ToolDelta:
        """The reply has ended: what was held back is a call, or content after all."""
        if self._forced and self.calls:
            return self._argue("" if _is_json(self._arguments) else self._held.rstrip())
        found = None
        if self._decided != "content" and (not self._strict or re.match(call_start(self._names), self._held)):
            found = _parse_calls(self._held, self._names)
        if found is None:
            return self._as_content()
        self.calls = len(found)
        return ToolDelta(
            calls=tuple(
                CallDelta(index=index, id=_new_id(), name=name, arguments=arguments)
                for index, (name, arguments) in enumerate(found)
            )
        )

    def _as_content(self) -> ToolDelta:
        held, self._held = self._held, ""
        return ToolDelta(content=held)

    def _as_arguments(self) -> ToolDelta:
        """The object around the arguments is ours to take off: its end is held back until more comes."""
        first: tuple[CallDelta, ...] = ()
        if not self.calls:
            opening = _OPENING.match(self._held)
            if opening is None:
                return ToolDelta()
            self.calls = 1
            self._held = self._held[opening.end() :]
            first = (CallDelta(index=0, id=_new_id(), name=opening[1]),)
        return ToolDelta(calls=(*first, *self._argue(self._held[: _ending(self._held)]).calls))

    def _argue(self, arguments: str) -> ToolDelta:
        self._held = self._held[len(arguments) :]
        self._arguments += arguments
        return ToolDelta(calls=(CallDelta(index=0, arguments=arguments),) if arguments else ())


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _ending(text: str) -> int:
    """Where the closing brace of the outer object may begin: what follows may not be the arguments' any more."""
    match = _ENDING.search(text)
    assert match is not None  # it matches an empty end
    return match.start()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _look(text: str, names: Collection[str]) -> Literal["content", "call"] | None:
    """What a reply is that begins so, as far as that can be told from its tag, its first field and the tool's name."""
    text = text.lstrip()
    if CALL_TAG.startswith(text):
        return None
    text = text.removeprefix(CALL_TAG).lstrip().removeprefix("[").lstrip()
    if text[:1] not in ("", "{"):
        return "content"
    text = text[1:].lstrip()
    if any(f'"{field}"'.startswith(text) for field in _CALL_FIELDS):
        return None
    match = re.match(r'"(\w+)"\s*(?::\s*("[^"]*"?)?)?', text)
    if match is None or match[1] not in _CALL_FIELDS:
        return "content"
    if match[1] != "name":
        return "call"
    name, rest = match[2], text[match.end() :]
    if name is None:
        return "content" if rest else None
    whole = [f'"{known}"' for known in names]
    return "call" if name in whole else None if any(one.startswith(name) for one in whole) else "content"


def _parse_calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """Name and arguments of each call, if `text` is nothing but calls of these tools."""
    text = text.strip()
    parts = [text]
    if text.startswith(CALL_TAG):
        # The last closing tag is often what the model ends its turn with.
        parts = [part.strip().removesuffix(END_CALL_TAG) for part in text.split(CALL_TAG)[1:]]
    calls: list[tuple[str, str]] = []
    try:
        for part in parts:
            value = json.loads(part)
            calls += [_call(item, names) for item in (value if isinstance(value, list) else [value])]
    except (ValueError, RecursionError):
        return None
    return calls or None


def _call(value: Any, names: Collection[str]) -> tuple[str, str]:
    if (
        not isinstance(value, dict)
        or not set(value) <= set(_CALL_FIELDS)
        or value.get("type", "function") != "function"
    ):
        raise ValueError("this is no call")
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        raise ValueError("this is no call of a tool that was given")
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    written.encode()  # Python's reader takes lone surrogates, and infinity, which no JSON has
    return name, written
