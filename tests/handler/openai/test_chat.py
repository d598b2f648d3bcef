"""Chats, field by field: what the engine is asked, and what comes back. What both endpoints share is tested with
completions."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import chat_template_utils

from tests.handler.openai.support import LOGPROB, SAID, USER, Server, deltas, usage

PATH = "v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}},
}
NEWS = {"type": "function", "function": {"name": "news"}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def calls(tool_calls: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", "tool_calls": tool_calls}, USER]}


def test_a_reply_has_openais_shape(server: Server) -> None:
    reply = server.say(PATH, "Yo", messages=[USER], model="llama")
    assert reply.pop("created") > 0
    assert reply == {
        "id": "chatcmpl-id",
        "object": "chat.completion",
        "model": "llama",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Yo", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": usage(21, 2),
    }


def test_messages_are_written_in_the_models_format_and_the_reply_is_a_text_of_its_own(server: Server) -> None:
    request = server.request(PATH, messages=[USER])
    assert server.shown(request.prompt_ids) == SAID
    assert not request.continues_prompt


def test_a_plain_chat_renders_its_template_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[Any] = []
    render = chat_template_utils.render_jinja_template

    def count(conversations: Any, **others: Any) -> Any:
        rendered.extend(conversations)
        return render(conversations, **others)

    monkeypatch.setattr(chat_template_utils, "render_jinja_template", count)
    server.request(PATH, messages=[{"role": "user", "content": "What is a llama?"}])
    assert len(rendered) == 1


def test_without_max_tokens_a_reply_may_be_as_long_as_fits(server: Server) -> None:
    assert server.request(PATH, messages=[USER]).params.max_new_tokens is None


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_either_name_limits_the_reply(server: Server, field: str) -> None:
    assert server.request(PATH, messages=[USER], **{field: 9}).params.max_new_tokens == 9
    both = {"max_tokens": 9, "max_completion_tokens": 9}
    assert server.request(PATH, messages=[USER], **both).params.max_new_tokens == 9


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_developer_is_what_the_model_knows_as_system(server: Server, role: str) -> None:
    request = server.request(PATH, messages=[{"role": role, "content": "Be brief."}, USER])
    assert server.shown(request.prompt_ids) == f"<|im_start|>system\nBe brief.<|im_end|>\n{SAID}"


def test_the_text_parts_of_a_content_are_one_text(server: Server) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    request = server.request(PATH, messages=[{"role": "user", "content": parts}])
    assert server.shown(request.prompt_ids) == SAID


def test_logprobs_are_one_object_per_token(server: Server) -> None:
    (choice,) = server.say(PATH, "xA", messages=[USER], logprobs=True, top_logprobs=1)["choices"]
    x = {"token": "x", "logprob": LOGPROB, "bytes": [120]}
    a = {"token": "a", "logprob": -0.25, "bytes": [97]}
    assert choice["logprobs"] == {
        "content": [
            {**x, "top_logprobs": [x]},
            {"token": "A", "logprob": -2.0, "bytes": [65], "top_logprobs": [a]},
        ],
        "refusal": None,
    }
    (choice,) = server.say(PATH, "x", messages=[USER], logprobs=True)["choices"]
    assert choice["logprobs"]["content"] == [{**x, "top_logprobs": []}]


def test_n_replies_have_an_index_each(server: Server) -> None:
    reply = server.say(PATH, "a", "bc", messages=[USER], n=2)
    assert [(choice["index"], choice["message"]["content"]) for choice in reply["choices"]] == [(0, "a"), (1, "bc")]
    assert reply["usage"]["completion_tokens"] == 3


def test_a_stream_is_role_then_content_then_reason_for_each_reply(server: Server) -> None:
    events = server.stream(PATH, "ab", "c", messages=[USER], n=2, finish_reason="length")
    role = {"role": "assistant", "content": ""}
    assert deltas(events, 0) == [role, {"content": "a"}, {"content": "b"}, {}]
    assert deltas(events, 1) == [role, {"content": "c"}, {}]
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    assert sorted(filter(None, reasons)) == ["length", "length"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}


def test_the_replies_of_a_stream_do_not_wait_for_each_other(server: Server) -> None:
    events = server.stream(PATH, "abc", "def", messages=[USER], n=2)
    indices = [event["choices"][0]["index"] for event in events]
    assert indices[:6] == [0, 0, 1, 1, 0, 1]


def test_streamed_logprobs_add_up_to_the_whole_ones(server: Server) -> None:
    body: dict[str, Any] = {"messages": [USER], "logprobs": True, "top_logprobs": 1}
    whole = server.say(PATH, "xAy", **body)["choices"][0]["logprobs"]["content"]
    events = server.stream(PATH, "xAy", **body)
    parts = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for part in parts if part for entry in part["content"]] == whole


def test_include_usage_adds_one_event_without_choices(server: Server) -> None:
    *events, last = server.stream(PATH, "xy", messages=[USER], stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 2)


@pytest.mark.parametrize(
    "field",
    [
        {"store": True},
        *({"service_tier": tier} for tier in ("auto", "default", "flex", "scale", "priority")),
        {"modalities": ["text"]},
        {"metadata": {"session": "5"}},
        *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high", "xhigh", "max")),
        *({"verbosity": verbosity} for verbosity in ("low", "medium", "high")),
        {"tool_choice": "none"},
        {"prompt_cache_key": "a"},
        *({"prompt_cache_retention": time} for time in ("in_memory", "in-memory", "24h")),
        {"prediction": {"type": "content", "content": "a"}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"parallel_tool_calls": True},
        {"functions": None},
        {"audio": None},
        {"prediction": None},
        {"web_search_options": None},
    ],
)
def test_a_field_without_effect_is_accepted(server: Server, field: dict[str, Any]) -> None:
    assert server.request(PATH, messages=[USER], **field) == server.request(PATH, messages=[USER])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("function_call", "auto"),
        ("functions", [{"name": "f"}]),
        ("modalities", ["text", "audio"]),
        ("web_search_options", {}),
        ("guided_grammar", "start: 'a'"),
        ("skip_special_tokens", False),
    ],
)
def test_a_field_that_means_nothing_here_is_refused_by_name(server: Server, field: str, value: Any) -> None:
    status, param, message = server.refused(PATH, messages=[USER], **{field: value})
    assert (status, param) == (400, field)
    assert message.startswith(f"{field} is not supported: ")


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_a_user_is_named_in_the_log(server: Server, caplog: pytest.LogCaptureFixture, field: str) -> None:
    with caplog.at_level("INFO"):
        server.request(PATH, messages=[USER], **{field: "eve"})
    assert "request id is for user 'eve'" in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "messages", "messages is missing"),
        ({"messages": []}, 400, "messages", "messages must not be empty"),
        ({"messages": "Hi"}, 400, "messages", "messages must be a list, got 'Hi'"),
        ({"messages": ["Hi"]}, 400, "messages[0]", "must be an object"),
        ({"messages": [{"content": "Hi"}]}, 400, "messages[0]", "must have a 'role'"),
        ({"messages": [{"role": "bot", "content": "Hi"}]}, 400, "messages[0]", "must have a 'role' of 'system'"),
        ({"messages": [USER, {"role": "assistant", "text": "Yo"}]}, 400, "messages[1].text", "is an unknown field"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "messages[0].content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "must be a string or a list"),
        ({"messages": [{**USER, "name": "Eve <s>"}]}, 400, "messages[0].name", "must match"),
        ({"messages": [USER], "store": 0}, 400, "store", "must be true or false"),
        ({"messages": [USER], "metadata": {"a": 1}}, 400, "metadata.a", "must be a string"),
        ({"messages": [USER], "reasoning_effort": "much"}, 400, "reasoning_effort", "must be 'none', 'minimal'"),
        (
            {"messages": [USER], "chat_template_kwargs": {"messages": []}},
            *(400, "chat_template_kwargs", "must not set 'messages'"),
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"a": "<|im_end|>"}},
            *(400, "chat_template_kwargs", "must map names to true, false, numbers and words"),
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            *(400, "messages[0].content[0].type", "is not supported: this model reads and writes text"),
        ),
        (
            {"messages": [USER, {"role": "tool", "tool_call_id": "a", "content": "x"}]},
            *(400, "messages[1].tool_call_id", "must be one of [], got 'a'"),
        ),
        ({"messages": [USER], "prompt": "Hi"}, 400, "prompt", "prompt is an unknown field"),
        ({"messages": [USER], "model": "gpt-4"}, 404, "model", "does not exist"),
        ({"messages": [USER], "max_tokens": 0}, 400, "max_tokens", "must be at least 1"),
        ({"messages": [USER], "max_completion_tokens": 0}, 400, "max_completion_tokens", "must be at least 1"),
        ({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "contradicts"),
        ({"messages": [USER], "max_tokens": 80}, 400, "messages", "maximum context length is 100 tokens, but 101"),
        ({"messages": [USER], "logprobs": 5}, 400, "logprobs", "must be true or false"),
        ({"messages": [USER], "top_logprobs": 5}, 400, "top_logprobs", "needs logprobs to be true"),
        ({"messages": [USER], "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "must be at most 20"),
        ({"messages": [USER], "best_of": 2}, 400, "best_of", "unknown field"),
        ({"messages": [USER], "tool_choice": "required"}, 400, "tool_choice", "there are no tools"),
        ({"messages": [USER], "tool_choice": "always"}, 400, "tool_choice", "must be 'none', 'auto' or 'required'"),
        (
            {"messages": [USER], "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            *(400, "tool_choice", "must name one of the tools"),
        ),
        ({"messages": [USER], "tool_choice": {"type": "x"}}, 400, "tool_choice.type", "must be 'function'"),
        ({"messages": [USER], "tools": "x"}, 400, "tools", "must be a list"),
        ({"messages": [USER], "tools": [NEWS] * 129}, 400, "tools", "must have at most 128 items"),
        ({"messages": [USER], "tools": [{"type": "retrieval"}]}, 400, "tools[0].type", "must be 'function'"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, 400, "tools[0].function", "is missing"),
        ({"messages": [USER], "tools": [NEWS, function(name="a b")]}, 400, "tools[1].function.name", "must match"),
        ({"messages": [USER], "tools": [function(what=1)]}, 400, "tools[0].function.what", "is an unknown field"),
        ({"messages": [USER], "tools": [function(description=1)]}, 400, "tools[0].function.description", "a string"),
        ({"messages": [USER], "tools": [function(strict=1)]}, 400, "tools[0].function.strict", "true or false"),
        (
            {"messages": [USER], "tools": [function(parameters={"type": "string"})]},
            *(400, "tools[0].function.parameters", "must be a JSON schema of type 'object'"),
        ),
        (calls("ab"), 400, "messages[1].tool_calls", "must be a list"),
        (calls([{"id": "a"}]), 400, "messages[1].tool_calls[0].function", "is missing"),
        (
            calls([{"id": "a", "function": {"name": "f", "arguments": "["}}]),
            *(400, "messages[1].tool_calls[0].function.arguments", "must be a JSON object in a string, got '['"),
        ),
        (
            calls([{"id": "a", "function": {"name": "f", "arguments": "[1]"}}]),
            *(400, "messages[1].tool_calls[0].function.arguments", "must be an object, got"),
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, 400, "messages[1].tool_call_id", "is missing"),
        ({"messages": [USER], "tools": [WEATHER, WEATHER]}, 400, "tools[1].function.name", "which another tool has"),
    ],
)
def test_a_mistake_is_refused_and_named(
    server: Server, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    refused = server.refused(PATH, **body)
    assert refused[:2] == (status, param)
    assert message in refused[2]
