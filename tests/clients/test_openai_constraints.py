"""Constrained replies and tools, asked for with the `openai` client, sync and async."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.clients.conftest import Asker

pytestmark = pytest.mark.clients

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


class City(BaseModel):
    """Bounded in every field, so that no model can ramble."""

    country: Literal["France", "Italy", "Spain"]
    inhabitants: Literal[1, 2, 5, 10]
    is_capital: bool


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Paris", "Rome"]},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_parse_returns_an_object_of_the_class_asked_for(ask: Asker, temperature: float) -> None:
    reply = ask(
        "chat.completions.parse", messages=QUESTION, response_format=City, temperature=temperature, max_tokens=80
    )
    assert isinstance(reply.choices[0].message.parsed, City)
    assert reply.choices[0].finish_reason == "stop"


def test_json_object_is_json_or_says_that_it_was_cut(ask: Asker) -> None:
    messages = [{"role": "user", "content": 'Answer in JSON, like {"capital": "Rome"}: the capital of France?'}]
    reply = ask(
        "chat.completions.create",
        messages=messages,
        temperature=0,
        max_tokens=64,
        response_format={"type": "json_object"},
    )
    (choice,) = reply.choices
    assert choice.message.content.lstrip().startswith("{")
    if choice.finish_reason != "length":
        assert isinstance(json.loads(choice.message.content), dict)


def test_a_reply_that_is_cut_is_told_from_one_that_parses(ask: Asker) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        ask("chat.completions.parse", messages=QUESTION, response_format=City, temperature=0, max_tokens=4)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_tool_call_has_arguments_of_its_schema(ask: Asker, choice: Any) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "How warm is it in Rome?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "temperature": 0,
        "max_tokens": 80,
    }
    reply = ask("chat.completions.create", **fields)
    (call,) = reply.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert call.id
    arguments = json.loads(call.function.arguments)
    assert set(arguments) == {"city", "unit"}
    assert arguments["city"] in ("Paris", "Rome")
    assert reply.choices[0].finish_reason == "tool_calls"

    chunks = ask("chat.completions.create", **fields, stream=True)
    deltas = [
        delta
        for chunk in chunks
        for choice in chunk.choices
        for delta in choice.delta.tool_calls or []
        if delta.function
    ]
    assert [delta.function.name for delta in deltas if delta.function.name] == ["get_weather"]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    assert {delta.index for delta in deltas} == {0}


class GetWeather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


TOOL = openai.pydantic_function_tool(GetWeather)


@pytest.mark.parametrize(("choice", "temperature"), [("auto", 0), ("required", 0), ("required", 1)])
def test_parse_reads_the_calls_of_a_pydantic_function_tool(ask: Asker, choice: str, temperature: float) -> None:
    """Its tool is strict. With auto the model may say something instead; a call that it makes is valid."""
    messages = [{"role": "user", "content": "Call GetWeather for Rome, in celsius."}]
    reply = ask(
        "chat.completions.parse",
        messages=messages,
        tools=[TOOL],
        tool_choice=choice,
        temperature=temperature,
        seed=1,
        max_tokens=200,
    )
    message = reply.choices[0].message
    calls = message.tool_calls or []
    assert message.content or calls
    assert len(calls) >= (choice == "required")
    assert all(isinstance(call.function.parsed_arguments, GetWeather) for call in calls)


def test_parse_with_tools_gives_an_object_or_a_call(ask: Asker) -> None:
    reply = ask(
        "chat.completions.parse",
        messages=QUESTION,
        tools=[TOOL],
        response_format=City,
        temperature=0,
        max_tokens=80,
    )
    message = reply.choices[0].message
    assert isinstance(message.parsed, City) != bool(message.tool_calls)


def test_tool_choice_none_gives_text(ask: Asker) -> None:
    reply = ask(
        "chat.completions.create", messages=QUESTION, tools=[WEATHER], tool_choice="none", temperature=0, max_tokens=20
    )
    assert not reply.choices[0].message.tool_calls
    assert reply.choices[0].message.content


def test_a_reply_can_be_sent_back_as_it_came(ask: Asker) -> None:
    """What everybody does: the client's own message objects become part of the next request."""
    fields: dict[str, Any] = {"tools": [WEATHER], "temperature": 0, "max_tokens": 40}
    asked = {"role": "user", "content": "How warm is it in Rome?"}
    called = ask("chat.completions.create", messages=[asked], **fields, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "31 degrees"}
    history = [asked, called, result]
    told = ask("chat.completions.create", messages=history, **fields, tool_choice="none").choices[0].message
    assert told.content
    history += [told, QUESTION[0]]
    assert ask("chat.completions.create", messages=history, **fields, tool_choice="none").choices[0].message.content
