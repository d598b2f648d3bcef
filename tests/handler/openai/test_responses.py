"""Responses, field by field: what the engine is asked, the whole reply, and its events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from handler.call import Call
from handler.errors import RequestError
from tests.handler.openai.support import LOGPROB, SAID, USER, FakeGrammar, Server

PATH = "v1/responses"
CHAT = "v1/chat/completions"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "name": "weather", "description": "of a city", "parameters": PARAMETERS}
CHAT_WEATHER = {"type": "function", "function": {**WEATHER, "strict": True}}
del CHAT_WEATHER["function"]["type"]  # type: ignore[attr-defined]
CALL = '{"name": "weather", "arguments": {"city": "Rome"}}'


def events_of(server: Server, reply: str, *, finish_reason: str = "stop", **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, whose names and numbers are checked here."""
    call = Call("id")
    requests, sent = call.begin(server.read(PATH, stream=True, **body)), ""
    for output in server.outputs(requests, [reply], finish_reason):
        call.take(output)
        sent += call.piece().text
    events = []
    for number, event in enumerate(sent.removesuffix("\n\n").split("\n\n")):
        name, data = event.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert (name, value["sequence_number"]) == (f"event: {value['type']}", number)
        events.append(value)
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def test_a_response_has_openais_shape(server: Server) -> None:
    reply = server.say(PATH, "Yo", input="Hi", model="llama", metadata={"a": "b"}, user="eve")
    assert reply.pop("created_at") > 0
    assert reply.pop("completed_at") > 0
    text = {"type": "output_text", "text": "Yo", "annotations": [], "logprobs": []}
    message = {"id": "msg_id_0", "type": "message", "status": "completed", "role": "assistant", "content": [text]}
    assert reply == {
        "id": "resp_id",
        "object": "response",
        "model": "llama",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "output": [message],
        "usage": {
            "input_tokens": 21,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 23,
        },
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": "eve",
    }


@pytest.mark.parametrize(
    "given",
    [
        "Hi",
        [USER],
        [
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}],
            }
        ],
    ],
)
def test_input_is_a_text_or_items(server: Server, given: Any) -> None:
    request = server.request(PATH, input=given)
    assert server.shown(request.prompt_ids) == SAID
    assert not request.continues_prompt


def test_instructions_are_a_system_message_and_come_back(server: Server) -> None:
    said = server.shown(server.request(PATH, input="Hi", instructions="Be brief.").prompt_ids)
    assert said == f"<|im_start|>system\nBe brief.<|im_end|>\n{SAID}"
    assert server.say(PATH, "Yo", input="Hi", instructions="Be brief.")["instructions"] == "Be brief."


def test_a_response_is_asked_as_the_same_chat_is(server_with_room: Server) -> None:
    """With what an earlier response has said and called, sent back as it came."""
    server = server_with_room
    first = server.say(PATH, CALL, input="Hi", tools=[WEATHER])["output"]
    call_id = first[0]["call_id"]
    said: dict[str, Any] = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    said["content"] = [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]
    items = [USER, said, *first, {"type": "function_call_output", "call_id": call_id, "output": "31"}]
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    messages = [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [{"id": call_id, "function": function}]},
        {"role": "tool", "tool_call_id": call_id, "content": "31"},
    ]
    request = server.request(PATH, input=items, tools=[WEATHER])
    assert request == server.request(CHAT, messages=messages, tools=[CHAT_WEATHER])


def test_sampling_and_limits_reach_the_engine(server: Server) -> None:
    params = server.request(PATH, input="Hi", max_output_tokens=9, temperature=0.5, top_p=0.1, seed=3, top_k=5).params
    assert (params.max_new_tokens, params.temperature, params.top_p, params.seed, params.top_k) == (9, 0.5, 0.1, 3, 5)
    assert server.request(PATH, input="Hi").params.max_new_tokens is None


def test_the_events_of_a_text_add_up_to_the_response(server: Server) -> None:
    events = events_of(server, "Yo!", input="Hi")
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * 3,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(event.get("delta", "") for event in events) == "Yo!"
    assert events[0]["response"]["status"] == "in_progress"
    assert (events[2]["item"]["content"], events[3]["part"]["text"]) == ([], "")
    assert events[-4]["text"] == events[-3]["part"]["text"] == events[-2]["item"]["content"][0]["text"] == "Yo!"
    whole = server.say(PATH, "Yo!", input="Hi")
    last = events[-1]["response"]
    for reply in (whole, last):
        del reply["created_at"], reply["completed_at"]
    assert last == whole


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "weather"}])
def test_the_events_of_a_call_add_up_to_it(server_with_room: Server, choice: Any) -> None:
    body: dict[str, Any] = {"input": "Hi", "tools": [WEATHER], "tool_choice": choice}
    events = events_of(server_with_room, CALL, **body)
    names = kinds(events)
    assert names[:3] == ["created", "in_progress", "output_item.added"]
    assert names[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(names[3:-3]) == {"function_call_arguments.delta"}
    arguments = "".join(event["delta"] for event in events[3:-3])
    assert json.loads(arguments) == {"city": "Rome"}
    assert (events[-3]["arguments"], events[-3]["name"]) == (arguments, "weather")
    (item,) = events[-1]["response"]["output"]
    assert item == events[-2]["item"] == events[2]["item"] | {"status": "completed", "arguments": arguments}
    (whole,) = server_with_room.say(PATH, CALL, **body)["output"]
    assert whole | {"call_id": ""} == item | {"call_id": ""}


def test_several_calls_are_several_items_unless_one_is_to_be_made(server_with_room: Server) -> None:
    body: dict[str, Any] = {"input": "Hi", "tools": [WEATHER]}
    calls = f"[{CALL}, {CALL}]"
    events = events_of(server_with_room, calls, **body)
    assert [event["output_index"] for event in events if event["type"].endswith("item.done")] == [0, 1]
    assert len(server_with_room.say(PATH, calls, **body)["output"]) == 2
    assert len(server_with_room.say(PATH, calls, **body, parallel_tool_calls=False)["output"]) == 1


def test_a_reply_that_was_cut_is_incomplete(server: Server) -> None:
    reply = server.say(PATH, "Yo", input="Hi", finish_reason="length")
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (reply["output"][0]["status"], reply["completed_at"]) == ("incomplete", None)
    assert kinds(events_of(server, "Yo", input="Hi", finish_reason="length"))[-1] == "incomplete"


def test_a_reply_without_text_is_an_empty_message(server: Server) -> None:
    (item,) = server.say(PATH, "", input="Hi")["output"]
    assert item["content"][0]["text"] == ""
    assert kinds(events_of(server, "", input="Hi"))[2:-1] == [
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
    ]


@pytest.mark.parametrize("field", [{"top_logprobs": 1}, {"include": ["message.output_text.logprobs"]}])
def test_logprobs_are_those_of_the_text(server: Server, field: dict[str, Any]) -> None:
    (item,) = server.say(PATH, "xy", input="Hi", **field)["output"]
    entries = item["content"][0]["logprobs"]
    assert [(entry["token"], entry["logprob"], entry["bytes"]) for entry in entries] == [
        *(("x", LOGPROB, [120]), ("y", LOGPROB, [121])),
    ]
    assert [len(entry["top_logprobs"]) for entry in entries] == [field.get("top_logprobs", 0)] * 2
    deltas = [event for event in events_of(server, "xy", input="Hi", **field) if "delta" in event]
    assert [entry for event in deltas for entry in event["logprobs"]] == entries


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def test_a_format_and_tools_hold_the_reply(server_with_room: Server) -> None:
    """A function is strict unless it says otherwise, as OpenAI's are."""

    def grammar(**body: Any) -> Any:
        return server_with_room.request(PATH, input="Hi", **body).grammar

    text = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}
    assert grammar(text=text) == FakeGrammar("json_schema", SCHEMA)
    assert grammar(text={"format": {"type": "json_object"}}) == FakeGrammar("json_object")
    assert grammar(text={"format": {"type": "text"}}) is None
    assert grammar(tools=[WEATHER]) == FakeGrammar("calls", ({"weather": PARAMETERS}, True))
    assert grammar(tools=[WEATHER | {"strict": False}]) is None
    assert grammar(tools=[WEATHER], tool_choice="none") is None
    assert grammar(tools=[WEATHER], tool_choice="required").source["properties"]["name"] == {"const": "weather"}
    assert len(grammar(tools=[WEATHER], text=text).source["anyOf"]) == 2


@pytest.mark.parametrize(
    "field",
    [
        {"store": True},
        {"metadata": {"a": "b"}},
        {"service_tier": "flex"},
        {"background": False},
        {"truncation": "disabled"},
        {"include": ["reasoning.encrypted_content"]},
        {"max_tool_calls": 3},
        {"prompt_cache_key": "a", "prompt_cache_retention": "24h"},
        {"reasoning": {"effort": "low", "summary": "auto"}},
        {"text": {"verbosity": "low"}},
        {"stream_options": {"include_obfuscation": False}},
        {"previous_response_id": None},
    ],
)
def test_a_field_of_a_response_without_effect_is_accepted(server: Server, field: dict[str, Any]) -> None:
    assert server.request(PATH, input="Hi", **field) == server.request(PATH, input="Hi")


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "must be a string or a list of items, got []"),
        ({"input": 5}, "input", "must be a string or a list of items"),
        ({"input": ["Hi"]}, "input", "must be a string or a list of items, got ['Hi']"),
        ({"input": [USER, "Hi"]}, "input[1]", "must be a message, a function_call or a function_call_output"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0]", "must be a message, a function_call or"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type", "nothing is stored here"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role", "must be 'user', 'assistant'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            *("input[0].content[0].type", "this model reads and writes text"),
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]},
            *("input", "input cannot be written: messages[0].tool_call_id must be one of [], got 'a'"),
        ),
        ({"input": "a" * 200}, "input", "has at least"),
        ({"input": "Hi", "previous_response_id": "resp_1"}, "previous_response_id", "send the whole conversation as"),
        ({"input": "Hi", "conversation": "a"}, "conversation", "nothing is stored here"),
        ({"input": "Hi", "background": True}, "background", "is not supported"),
        ({"input": "Hi", "truncation": "auto"}, "truncation", "is not supported"),
        ({"input": "Hi", "prompt": {"id": "a"}}, "prompt", "is not supported"),
        ({"input": "Hi", "messages": [USER]}, "messages", "is an unknown field"),
        ({"input": "Hi", "n": 2}, "n", "is an unknown field"),
        ({"input": "Hi", "max_output_tokens": 0}, "max_output_tokens", "must be at least 1"),
        ({"input": "Hi", "max_output_tokens": 90}, "input", "maximum context length is 100 tokens"),
        ({"input": "Hi", "tools": [{"type": "web_search"}]}, "tools[0].type", "has no tools of its own"),
        ({"input": "Hi", "tools": [WEATHER, WEATHER]}, "tools[1].name", "which another tool has"),
        ({"input": "Hi", "tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"input": "Hi", "tool_choice": {"type": "function", "name": "x"}}, "tool_choice", "must name one of"),
        ({"input": "Hi", "text": {"format": {"type": "xml"}}}, "text.format", "must have a 'type' of 'text'"),
        (
            {"input": "Hi", "text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "nonsense"}}}},
            *("text.format", "there is no type 'nonsense'"),
        ),
    ],
)
def test_a_mistake_in_a_response_is_refused_and_named(
    server: Server, body: dict[str, Any], param: str, message: str
) -> None:
    refused = server.refused(PATH, **body)
    assert refused[:2] == (400, param)
    assert message in refused[2]


def test_a_failure_under_way_is_an_event_of_its_own(server: Server) -> None:
    form = server.read(PATH, input="Hi", stream=True)
    name, data = form.failure(RequestError("it broke", status=500)).strip().split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert (name, event["type"], event["message"], event["code"]) == ("event: error", "error", "it broke", "500")
