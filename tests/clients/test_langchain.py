"""langchain-openai: a chat, its stream, tools and structured output."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.clients.conftest import Service

pytestmark = pytest.mark.clients

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."


@pytest.fixture(scope="module")
def chat(service: Service, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=service.base_url, api_key=service.key, model=model, temperature=0, max_tokens=120, max_retries=0
    )


@tool
def get_weather(city: Literal["Paris", "Rome"], unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"It is 31 degrees {unit} in {city}."


@tool
def add(left: Annotated[int, Field(ge=0, le=99)], right: Annotated[int, Field(ge=0, le=99)]) -> int:
    """Add two numbers."""
    return left + right


class Country(BaseModel):
    """A country and its capital."""

    name: Literal["France", "Italy"]
    capital: Literal["Paris", "Rome"]
    landlocked: bool


def test_a_chat_is_answered_with_its_usage(chat: ChatOpenAI) -> None:
    reply = chat.invoke([SystemMessage("You are a helpful assistant."), HumanMessage(QUESTION)])
    assert "Paris" in reply.content
    assert reply.response_metadata["finish_reason"] == "stop"
    assert reply.usage_metadata is not None
    assert reply.usage_metadata["output_tokens"] > 3


def test_a_stream_says_what_the_whole_reply_says(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in chunks) == ANSWER
    assert len(chunks) > 5
    total: Any = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.usage_metadata["output_tokens"] == chat.invoke(QUESTION).usage_metadata["output_tokens"]


def test_a_batch_is_answered_in_order_and_asynchronously(chat: ChatOpenAI) -> None:
    questions = [QUESTION, QUESTION.replace("France", "Italy")]
    replies = asyncio.run(chat.abatch(list(questions)))
    assert [reply.content for reply in replies] == [chat.invoke(question).content for question in questions]
    assert "Rome" in str(replies[1].content)


@pytest.mark.parametrize("choice", ["get_weather", "any"])
def test_a_forced_tool_is_called_and_its_result_is_read(chat: ChatOpenAI, choice: str) -> None:
    """The whole round: a question, the call, the tool's own run, and an answer that has read its result."""
    tools = [get_weather] if choice == "get_weather" else [get_weather, add]
    history: list[Any] = [HumanMessage("How warm is it in Rome, in celsius?")]
    called = chat.bind_tools(tools, tool_choice=choice).invoke(history)
    assert isinstance(called, AIMessage)
    assert not called.invalid_tool_calls
    (call,) = called.tool_calls
    chosen = {each.name: each for each in tools}[call["name"]]
    result = chosen.invoke(call)
    assert isinstance(result, ToolMessage)
    answer = chat.bind_tools(tools, tool_choice="none").invoke([*history, called, result])
    assert answer.content
    assert not answer.tool_calls


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
@pytest.mark.parametrize("strict", [None, True])
def test_an_agent_with_two_tools_comes_to_an_answer(
    service: Service, model: str, responses: bool, strict: bool | None
) -> None:
    """The model calls, its tools run, their results go back, until it answers. It must call in its first two turns,
    since so small a model would not."""
    chat = ChatOpenAI(
        base_url=service.base_url,
        api_key=service.key,
        model=model,
        temperature=0,
        max_retries=0,
        max_tokens=120,
        use_responses_api=responses,
    )
    tools = {each.name: each for each in (get_weather, add)}
    history: list[Any] = [
        SystemMessage("You are a helpful assistant."),
        HumanMessage("How warm is it in Rome, in celsius, and what is 20 + 22?"),
    ]
    ran: list[str] = []
    for choice in ("get_weather", "add", "none"):
        reply = chat.bind_tools([*tools.values()], tool_choice=choice, strict=strict).invoke(history)
        assert isinstance(reply, AIMessage)
        assert not reply.invalid_tool_calls
        history.append(reply)
        for call in reply.tool_calls:
            result = tools[call["name"]].invoke(call)
            assert isinstance(result, ToolMessage)
            assert result.status == "success"
            ran.append(call["name"])
            history.append(result)
    assert ran == ["get_weather", "add"]
    assert history[-1].text
    assert not history[-1].tool_calls
    free = chat.bind_tools([*tools.values()], strict=strict).invoke(history[:2])
    assert free.tool_calls or free.text


def test_a_streamed_tool_call_is_the_whole_one(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([get_weather], tool_choice="get_weather")
    whole = bound.invoke("How warm is it in Rome?")
    total: Any = None
    for chunk in bound.stream("How warm is it in Rome?"):
        total = chunk if total is None else total + chunk
    calls = [(call["name"], call["args"]) for call in total.tool_calls]
    assert calls == [(call["name"], call["args"]) for call in whole.tool_calls]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object_of_its_class(chat: ChatOpenAI, method: Any) -> None:
    country = chat.with_structured_output(Country, method=method).invoke("Describe France.")
    assert isinstance(country, Country)


def test_json_mode_is_json(chat: ChatOpenAI) -> None:
    asked = 'Answer with one short JSON object like {"capital": "Rome"}. The capital of France?'
    reply = chat.bind(response_format={"type": "json_object"}).invoke(asked)
    assert str(reply.content).lstrip().startswith("{")
