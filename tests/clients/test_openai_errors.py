"""Each mistake raises the openai client's own class for it."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import openai
import pytest

from tests.clients.conftest import Asker, Service

pytestmark = pytest.mark.clients

PROMPT = {"prompt": "Once upon a time"}
MESSAGES = {"messages": [{"role": "user", "content": "Hello"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

# endpoint, fields, the field that is named
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("completions", {**PROMPT, "temperature": 3}, "temperature"),
    ("completions", {**PROMPT, "top_p": 1.5}, "top_p"),
    ("completions", {**PROMPT, "max_tokens": -1}, "max_tokens"),
    ("completions", {**PROMPT, "n": 0}, "n"),
    ("completions", {**PROMPT, "n": 3, "best_of": 2}, "best_of"),
    ("completions", {**PROMPT, "logprobs": 21}, "logprobs"),
    ("completions", {**PROMPT, "suffix": "the end"}, "suffix"),
    ("completions", {**PROMPT, "logit_bias": {"5": 101}}, "logit_bias"),
    ("completions", {**PROMPT, "presence_penalty": "much"}, "presence_penalty"),
    ("completions", {**PROMPT, "extra_body": {"no_such_field": 1}}, "no_such_field"),
    ("completions", {"prompt": {"text": "Hello"}}, "prompt"),
    ("completions", {"prompt": [0, 10**9]}, "prompt"),
    ("completions", {"prompt": "word " * 2000}, "prompt"),
    ("chat.completions", {"messages": []}, "messages"),
    ("chat.completions", {"messages": [{"role": "nobody", "content": "Hello"}]}, "messages"),
    ("chat.completions", {**MESSAGES, "stop": [""] * 5}, "stop"),
    ("chat.completions", {**MESSAGES, "top_logprobs": 2}, "top_logprobs"),
    ("chat.completions", {**MESSAGES, "stream_options": {"include_usage": True}}, "stream_options"),
    ("chat.completions", {**MESSAGES, "response_format": {"type": "poem"}}, "response_format"),
    ("chat.completions", {**MESSAGES, "tool_choice": "required"}, "tool_choice"),
    ("chat.completions", {**MESSAGES, "tools": [TOOL], "tool_choice": "sometimes"}, "tool_choice"),
    ("chat.completions", {**MESSAGES, "modalities": ["audio"], "audio": {"voice": "ash", "format": "mp3"}}, "audio"),
]


@pytest.mark.parametrize(
    ("endpoint", "fields", "named"), MISTAKES, ids=[f"{endpoint}-{named}" for endpoint, _, named in MISTAKES]
)
def test_a_mistake_is_a_bad_request_that_names_the_field(
    ask: Asker, endpoint: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(f"{endpoint}.create", **fields)
    error = caught.value
    assert named in error.message
    assert error.param is not None
    assert error.param.startswith(named) or named in ("modalities", "audio")
    assert error.type == "invalid_request_error"
    assert isinstance(error.body, dict)
    assert {"message", "type", "param", "code"} <= set(error.body)


def test_a_mistake_in_a_stream_is_raised_before_its_first_chunk(ask: Asker) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        ask("chat.completions.create", **MESSAGES, temperature=-1, stream=True)


def test_a_model_that_is_not_served_is_not_found(ask: Asker) -> None:
    for endpoint, fields in (("completions", PROMPT), ("chat.completions", MESSAGES)):
        with pytest.raises(openai.NotFoundError, match="no-such-model") as caught:
            ask(f"{endpoint}.create", **fields, model="no-such-model")
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no-such-model"):
        ask("models.retrieve", "no-such-model")


def test_an_endpoint_that_is_not_served_is_not_found(ask: Asker) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        ask("embeddings.create", input="Hello")


def test_a_wrong_key_is_refused_by_torchserve_itself(ask: Asker) -> None:
    """TorchServe looks at the key before any of our code runs. It answers 400, not OpenAI's 401, in its own
    shape, so the client raises BadRequestError, not AuthenticationError."""
    with pytest.raises(openai.BadRequestError, match="Token Authorization failed") as caught:
        ask("models.list", settings={"api_key": "sk-wrong"})
    assert caught.value.type == "InvalidKeyException"


def test_a_reply_that_comes_too_late_is_a_timeout(ask: Asker) -> None:
    with pytest.raises(openai.APITimeoutError):
        ask("completions.create", **PROMPT, max_tokens=400, extra_body={"ignore_eos": True}, timeout=0.2)


def test_a_server_that_is_down_is_a_connection_error(ask: Asker) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(openai.APIConnectionError):
        ask("models.list", settings={"base_url": f"http://127.0.0.1:{port}/v1"})


def test_a_full_queue_is_a_503_and_passes(service: Service, model: str) -> None:
    """16 requests are live and 16 wait in TorchServe's queue; of 40 some must be refused. TorchServe does that before
    any of our code runs, and in its own words: they first mention a missing worker, and the queue last."""
    refused: list[openai.InternalServerError] = []
    served: list[str] = []
    leave = threading.Event()

    def ask_for_long() -> None:
        try:
            stream = client.completions.create(
                model=model, prompt="Once", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
            )
        except openai.InternalServerError as error:
            refused.append(error)
            return
        with stream:
            for chunk in stream:
                served.append(chunk.id)
                if leave.is_set():
                    return

    with openai.OpenAI(base_url=service.base_url, api_key=service.key, max_retries=0) as client:
        threads = [threading.Thread(target=ask_for_long) for _ in range(40)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while not (refused and served) and time.monotonic() < end:
            time.sleep(0.05)
        leave.set()
        for thread in threads:
            thread.join(timeout=120)
        assert refused
        assert {error.status_code for error in refused} == {503}
        assert {error.type for error in refused} == {"ServiceUnavailableException"}
        assert all("JobQueueSize" in error.message for error in refused)
        assert client.completions.create(model=model, prompt="Once", max_tokens=1).choices
