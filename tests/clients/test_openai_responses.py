"""The Responses API with the `openai` client, sync and async: its own types read every reply and every event."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.clients.conftest import Asker, Service

pytestmark = pytest.mark.clients

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."


class City(BaseModel):
    """Bounded in every field, so that no model can ramble."""

    country: Literal["France", "Italy", "Spain"]
    is_capital: bool


class GetWeather(BaseModel):
    """The weather in a city."""

    city: Literal["Paris", "Rome"]
    unit: Literal["celsius", "fahrenheit"]


TOOL = openai.pydantic_function_tool(GetWeather)["function"] | {"type": "function"}


def test_a_response_says_what_a_chat_says(ask: Asker) -> None:
    reply = ask("responses.create", input=QUESTION, temperature=0)
    assert isinstance(reply, Response)
    assert Response.model_validate(reply.model_dump()) == reply
    assert (reply.status, reply.output_text) == ("completed", ANSWER)
    chat = ask("chat.completions.create", messages=[{"role": "user", "content": QUESTION}], temperature=0)
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (
        *(chat.usage.prompt_tokens, chat.usage.completion_tokens),
    )


def test_the_events_of_a_stream_are_those_of_the_client(ask: Asker) -> None:
    events = ask("responses.create", input=QUESTION, temperature=0, stream=True)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ANSWER
    for event in events:
        assert type(event).model_validate(event.model_dump()) == event
        assert type(event).__name__ != "BaseModel"
    first, *_, last = events
    assert (first.type, last.type) == ("response.created", "response.completed")
    assert last.response.output_text == ANSWER


def test_the_clients_own_stream_adds_up(service: Service, model: str) -> None:
    """Its helper keeps a snapshot of the response, which every event has to fit."""
    with openai.OpenAI(base_url=service.base_url, api_key=service.key) as client:
        with client.responses.stream(model=model, input=QUESTION, temperature=0) as stream:
            said = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert said == ANSWER == stream.get_final_response().output_text
        with client.responses.stream(
            model=model, input="Rome?", tools=[TOOL], tool_choice="required", temperature=0, max_output_tokens=80
        ) as stream:
            events = list(stream)
            (call,) = stream.get_final_response().output
    assert call.type == "function_call"
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    GetWeather.model_validate_json(call.arguments)


@pytest.mark.parametrize("temperature", [0, 1])
def test_parse_returns_an_object_of_the_class(ask: Asker, temperature: float) -> None:
    reply = ask("responses.parse", input=QUESTION, text_format=City, temperature=temperature, max_output_tokens=60)
    assert isinstance(reply.output_parsed, City)


def test_a_dialog_goes_on_with_the_items_of_the_response(ask: Asker) -> None:
    """The round of an agent: a call, its result, and an answer; items are sent back as they came."""
    items: list[Any] = [{"role": "user", "content": "How warm is it in Rome, in celsius?"}]
    fields: dict[str, Any] = {"instructions": "Be brief.", "tools": [TOOL], "temperature": 0, "max_output_tokens": 60}
    called = ask("responses.create", input=items, tool_choice="required", **fields)
    (call,) = called.output
    assert (call.type, call.name, call.status) == ("function_call", "GetWeather", "completed")
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    items += [call, {"type": "function_call_output", "call_id": call.call_id, "output": "31 degrees"}]
    told = ask("responses.create", input=items, tool_choice="none", **fields)
    assert told.output_text
    items += [*told.output, {"role": "user", "content": QUESTION}]
    assert ask("responses.create", input=items, tool_choice="none", **fields).output_text


def test_a_response_that_reaches_its_limit_is_incomplete(ask: Asker) -> None:
    reply = ask("responses.create", input=QUESTION, temperature=0, max_output_tokens=3)
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert reply.usage.output_tokens == 3


def test_logprobs_of_a_response_spell_its_text(ask: Asker) -> None:
    reply = ask("responses.create", input=QUESTION, temperature=0, top_logprobs=2, max_output_tokens=5)
    (content,) = reply.output[0].content
    assert "".join(entry.token for entry in content.logprobs) == content.text
    assert all(len(entry.top_logprobs) == 2 for entry in content.logprobs)


def test_an_earlier_response_is_not_kept(ask: Asker) -> None:
    with pytest.raises(openai.BadRequestError, match="send the whole conversation as input") as caught:
        ask("responses.create", input="Hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
