"""Tools of a chat: in the prompt, and as calls in the reply, streamed or not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.handler.openai.support import SAID, USER, FakeGrammar, Server, deltas
from tests.handler.openai.test_chat import NEWS, WEATHER, function

PATH = "v1/chat/completions"
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'


def test_tools_are_in_the_prompt_unless_they_must_not_be_called(server_with_room: Server) -> None:
    server = server_with_room
    offered = server.shown(server.request(PATH, messages=[USER], tools=[WEATHER]).prompt_ids)
    assert '"weather"' in offered
    assert "of a city" in offered
    assert server.shown(server.request(PATH, messages=[USER], tools=[WEATHER], tool_choice="none").prompt_ids) == SAID


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_a_tool_is_told_from_content(server_with_room: Server, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [WEATHER, NEWS]}
    if stream:
        events = server_with_room.stream(PATH, CALL, **body)
        calls = [call for delta in deltas(events) for call in delta.get("tool_calls", ())]
        assert not any(delta.get("content") for delta in deltas(events))
        assert [call["index"] for call in calls] == [0] * len(calls)
        call = {**calls[0], "function": {"name": calls[0]["function"]["name"]}}
        call["function"]["arguments"] = "".join(one["function"]["arguments"] for one in calls)
        reason = events[-1]["choices"][0]["finish_reason"]
    else:
        (choice,) = server_with_room.say(PATH, CALL, **body)["choices"]
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        reason = choice["finish_reason"]
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    assert reason == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_with_tools_may_be_content_all_the_same(server_with_room: Server, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [WEATHER]}
    if stream:
        events = server_with_room.stream(PATH, "Sunny {}", **body)
        assert "".join(delta.get("content", "") for delta in deltas(events)) == "Sunny {}"
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        (choice,) = server_with_room.say(PATH, "Sunny {}", **body)["choices"]
        assert (choice["message"], choice["finish_reason"]) == (
            *({"role": "assistant", "content": "Sunny {}", "refusal": None}, "stop"),
        )


def test_a_forced_call_has_no_other_format(server_with_room: Server) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [WEATHER], "tool_choice": "required"}
    status, param, _ = server_with_room.refused(PATH, **body, response_format={"type": "json_object"})
    assert (status, param) == (400, "response_format")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_held_to_the_schema_of_the_tool(server_with_room: Server, choice: Any) -> None:
    request = server_with_room.request(PATH, messages=[USER], tools=[WEATHER], tool_choice=choice)
    assert isinstance(request.grammar, FakeGrammar)
    assert request.grammar.kind == "json_schema"
    assert request.grammar.source["properties"]["name"] == {"const": "weather"}


def test_a_call_that_was_cut_says_so(server_with_room: Server) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    body: dict[str, Any] = {"messages": [USER], "tools": [WEATHER], "tool_choice": choice}
    reply = server_with_room.say(PATH, '{"name": "weather", "arguments": {"ci', finish_reason="length", **body)
    (cut,) = reply["choices"]
    assert cut["finish_reason"] == "length"
    assert cut["message"]["tool_calls"][0]["function"]["arguments"] == '{"ci'


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_tool_calls_one_is_made(server_with_room: Server, stream: bool) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [WEATHER], "parallel_tool_calls": False}
    both = f"[{CALL}, {CALL}]"
    if stream:
        calls = [
            call
            for delta in deltas(server_with_room.stream(PATH, both, **body))
            for call in delta.get("tool_calls", ())
        ]
    else:
        calls = server_with_room.say(PATH, both, **body)["choices"][0]["message"]["tool_calls"]
    assert len(calls) == 1


def test_calls_and_their_results_go_into_the_next_prompt(server_with_room: Server) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "21 degrees"},
    ]
    shown = server_with_room.shown(server_with_room.request(PATH, messages=messages, tools=[WEATHER]).prompt_ids)
    assert shown.index("Rome") < shown.index("21 degrees")


STRICT = function(name="weather", strict=True, parameters={"type": "object", "properties": {}})


@pytest.mark.parametrize("parallel", [True, False])
def test_a_strict_tool_holds_a_call_to_its_schema_once_it_begins(server_with_room: Server, parallel: bool) -> None:
    """With tool_choice auto, as openai's own helpers send it. A tool that is not strict gets any object."""
    body: dict[str, Any] = {"messages": [USER], "tools": [STRICT, NEWS], "parallel_tool_calls": parallel}
    schemas = {"weather": {"type": "object", "properties": {}}, "news": {"type": "object"}}
    assert server_with_room.request(PATH, **body).grammar == FakeGrammar("calls", (schemas, parallel))
    assert server_with_room.request(PATH, **body, tool_choice="none").grammar is None
    assert server_with_room.request(PATH, **body | {"tools": [WEATHER, NEWS]}).grammar is None


def test_a_strict_call_is_one_only_if_it_began_as_one(server_with_room: Server) -> None:
    body: dict[str, Any] = {"messages": [USER], "tools": [STRICT]}
    (choice,) = server_with_room.say(PATH, CALL, **body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (choice,) = server_with_room.say(PATH, CALL.replace("name", "n\\u0061me"), **body)["choices"]
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)


@pytest.mark.parametrize("tool", [WEATHER, STRICT])
def test_with_tools_a_reply_follows_its_format_or_is_a_call(server_with_room: Server, tool: Any) -> None:
    answer = {"type": "object", "properties": {"degrees": {"type": "integer"}}}
    shape = {"type": "json_schema", "json_schema": {"name": "a", "schema": answer}}
    grammar = server_with_room.request(PATH, messages=[USER], tools=[tool], response_format=shape).grammar
    assert isinstance(grammar, FakeGrammar)
    first, call = grammar.source["anyOf"]
    assert first["properties"] == answer["properties"]
    assert call["properties"]["name"] == {"const": "weather"}
    alone = server_with_room.request(PATH, messages=[USER], tools=[tool], response_format=shape, tool_choice="none")
    assert alone.grammar == FakeGrammar("json_schema", answer)


def test_strict_tools_and_another_grammar_are_one_too_many(server_with_room: Server) -> None:
    refused = server_with_room.refused(PATH, messages=[USER], tools=[STRICT], guided_regex="a")
    assert refused[:2] == (400, "guided_regex")
    assert "cannot be combined with tools" in refused[2]
