"""Owns how tools look in a prompt whose model has no format of its own for them: as plain text.

Neither Llama 2 nor every chat template knows tools. For those the tools stand in the system prompt, a call is an
assistant's turn of nothing but JSON in tags, and what tools returned is a user's turn:

    system      {the dialog's own system prompt, if it has one}

                You can call tools. They are, with the JSON schemas of their parameters:
                {"name": ..., "description": ..., "parameters": {...}}
                ...
                To call one, answer with nothing but a JSON object: {"name": ..., "arguments": {...}}
    user        What is the weather in Paris?
    assistant   <tool_call>
                {"name": "weather", "arguments": {"city": "Paris"}}
                </tool_call>
    user        <tool_response>
                Sunny, 21 degrees
                </tool_response>

Knows no tokenizer: it turns messages into messages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

CALL_TAG, END_CALL_TAG = "<tool_call>", "</tool_call>"
RESPONSE_TAG, END_RESPONSE_TAG = "<tool_response>", "</tool_response>"
TAGS = (CALL_TAG, END_CALL_TAG, RESPONSE_TAG, END_RESPONSE_TAG)


def as_text(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """`messages` without tools, calls and tool turns: nothing but system, user, assistant, user, ..."""
    plain: list[dict[str, str]] = []
    for is_tool, group in itertools.groupby(messages, lambda message: message["role"] == "tool"):
        if is_tool:  # all that answer in one turn
            responses = [_tagged(RESPONSE_TAG, message["content"], END_RESPONSE_TAG) for message in group]
            plain.append({"role": "user", "content": "\n".join(responses)})
        else:
            plain += [{"role": message["role"], "content": _with_calls(message)} for message in group]
    if tools:
        if plain[0]["role"] != "system":
            plain.insert(0, {"role": "system", "content": ""})
        own = plain[0]["content"]
        plain[0]["content"] = f"{own}\n\n{_offer(tools)}" if own.strip() else _offer(tools)
    return plain


def _with_calls(message: Mapping[str, Any]) -> str:
    calls = [_tagged(CALL_TAG, _as_json(call["function"]), END_CALL_TAG) for call in message.get("tool_calls", ())]
    texts = [message["content"]] if message["content"] or not calls else []
    return "\n".join([*texts, *calls])


def _offer(tools: Sequence[Mapping[str, Any]]) -> str:
    lines = "\n".join(_as_json(tool["function"]) for tool in tools)
    return (
        f"You can call tools. They are, with the JSON schemas of their parameters:\n{lines}\n"
        'To call one, answer with nothing but a JSON object: {"name": ..., "arguments": {...}}'
    )


def _tagged(tag: str, text: str, end: str) -> str:
    return f"{tag}\n{text}\n{end}"


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
