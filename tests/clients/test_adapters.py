"""Adapters through the openai client: several at the same time, listed, loaded and unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tests.clients.conftest import Service

pytestmark = pytest.mark.clients

QUESTION = "The lighthouse keeper opened the door and"


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=service.base_url, api_key=service.key, max_retries=0) as made:
        yield made


async def streamed(service: Service, names: list[str]) -> list[str]:
    """What each model says, all streams at the same time."""
    async with openai.AsyncOpenAI(base_url=service.base_url, api_key=service.key, max_retries=0) as client:

        async def one(name: str) -> str:
            stream = await client.completions.create(
                model=name, prompt=QUESTION, max_tokens=24, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

        return await asyncio.gather(*map(one, names))


def test_two_adapters_and_the_base_stream_at_the_same_time_what_each_says_alone(
    service: Service, client: openai.OpenAI, model: str
) -> None:
    names = [model, "first", "second"]
    together = asyncio.run(streamed(service, [*names, *names]))
    alone = [
        client.completions.create(model=name, prompt=QUESTION, max_tokens=24, temperature=0).choices[0].text
        for name in (model, f"{model}:first", f"{model}:second")
    ]
    assert together == [*alone, *alone]
    assert len(set(alone)) == 3


def test_adapters_are_models_with_a_parent(client: openai.OpenAI, model: str) -> None:
    listed = {one.id: one for one in client.models.list()}
    assert {"first", "second", "spare"} <= listed.keys()
    assert listed["first"].model_dump()["parent"] == model
    assert client.models.retrieve("second").id == "second"


def test_an_unknown_adapter_is_not_found_and_the_message_names_those_there_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match=r"'first'.*'second'"):
        client.completions.create(model="third", prompt=QUESTION)


def test_one_that_cannot_be_read_is_a_400_also_when_the_engine_finds_it_out(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="the adapter cannot be had"):
            client.completions.create(model="damaged", prompt=QUESTION, stream=stream)
    with pytest.raises(openai.BadRequestError, match="the adapter cannot be had"):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "damaged"}, cast_to=object)


def test_an_adapter_is_loaded_and_unloaded_as_vllm_does(client: openai.OpenAI) -> None:
    asked = {"lora_name": "added", "lora_path": "spare"}
    client.post("/load_lora_adapter", body=asked, cast_to=object)
    assert client.completions.create(model="added", prompt=QUESTION, max_tokens=3).model == "added"
    with pytest.raises(openai.BadRequestError, match="load_inplace"):
        client.post("/load_lora_adapter", body=asked, cast_to=object)
    client.post("/unload_lora_adapter", body={"lora_name": "added"}, cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="added", prompt=QUESTION)
