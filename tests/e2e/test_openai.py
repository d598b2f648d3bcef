"""The OpenAI API through a real TorchServe: what unit tests cannot see of HTTP, of the engine and of both together."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import Served, serving
from tests.e2e.test_serve import wait_until
from tests.handler.support import settings

pytestmark = pytest.mark.integration

PROMPT = "The history of the lighthouse begins"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "people": {"type": "integer"}},
    "required": ["city", "people"],
    "additionalProperties": False,
}


class Api:
    """An HTTP client of the API; what it returns has been checked."""

    def __init__(self, served: Served) -> None:
        self.base = f"{served.url}/1.0/v1"
        self.client = served.client()

    def ask(self, path: str, **body: Any) -> Any:
        reply = self.client.post(f"{self.base}/{path}", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.headers["content-type"] == "application/json"
        return reply.json()

    def get(self, path: str) -> Any:
        reply = self.client.get(f"{self.base}/{path}")
        assert reply.status_code == 200, reply.text
        return reply.json()

    def stream(self, path: str, **body: Any) -> Iterator[Any]:
        with self.client.stream("POST", f"{self.base}/{path}", json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            assert reply.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
        assert events.pop() == "[DONE]"
        yield from map(json.loads, events)


@pytest.fixture
def api(served: Served) -> Iterator[Api]:
    made = Api(served)
    yield made
    made.client.close()


def test_models_and_health_are_there_for_a_get(api: Api) -> None:
    assert [model["id"] for model in api.get("models")["data"]] == ["llama"]
    assert api.get("models/llama")["max_model_len"] == 1024
    health = api.get("health")
    assert (health["status"], health["running"], health["waiting"]) == ("ok", 0, 0)


def test_a_chat_is_answered_whole_and_streamed_with_the_same_words(api: Api) -> None:
    body: dict[str, Any] = {"model": "llama", "messages": QUESTION, "temperature": 0}
    whole = api.ask("chat/completions", **body)
    (choice,) = whole["choices"]
    assert choice["message"]["content"] == "The capital of France is Paris."
    assert choice["finish_reason"] == "stop"
    *events, last = api.stream("chat/completions", **body, stream_options={"include_usage": True})
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == choice["message"]["content"]
    assert (deltas[-1], events[-1]["choices"][0]["finish_reason"]) == ({}, "stop")
    usages = [{**reply["usage"], "prompt_tokens_details": None} for reply in (last, whole)]
    assert usages[0] == usages[1], "all but the cached tokens: the second one has more of them"


def test_a_stream_arrives_piece_by_piece(api: Api) -> None:
    body = {"model": "llama", "prompt": PROMPT, "max_tokens": 60, "stream": True, "ignore_eos": True}
    arrivals = []
    with api.client.stream("POST", f"{api.base}/completions", json=body) as reply:
        arrivals = [time.monotonic() for line in reply.iter_lines() if line]
    assert len(arrivals) > 50
    assert arrivals[-1] - arrivals[0] > 0.1


def test_n_replies_share_a_prompt_and_a_seed_gives_all_of_them_again(api: Api) -> None:
    body: dict[str, Any] = {"prompt": [PROMPT, "Once"], "n": 3, "max_tokens": 8, "seed": 5}
    reply = api.ask("completions", **body)
    texts = [choice["text"] for choice in reply["choices"]]
    assert len(set(texts)) == 6
    assert reply["usage"]["prompt_tokens"] < 10
    assert [choice["text"] for choice in api.ask("completions", **body)["choices"]] == texts
    summed = [""] * 6
    for event in api.stream("completions", **body):
        for choice in event["choices"]:
            summed[choice["index"]] += choice["text"]
    assert summed == texts


def test_best_of_shows_what_the_model_finds_likeliest(api: Api) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "logprobs": 0, "seed": 1}

    def mean(choice: Any) -> float:
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["token_logprobs"])

    every = api.ask("completions", **body, n=4)["choices"]
    best = api.ask("completions", **body, n=1, best_of=4)
    assert best["choices"][0]["text"] == max(every, key=mean)["text"]
    assert best["usage"]["completion_tokens"] == 24


def test_scoring_a_text_gives_the_log_probabilities_with_which_it_was_generated(api: Api) -> None:
    written = api.ask("completions", prompt=PROMPT, max_tokens=12, temperature=0, logprobs=1, echo=True)["choices"][0]
    scored = api.ask("completions", prompt=written["text"], max_tokens=0, logprobs=1, echo=True)
    (choice,) = scored["choices"]
    assert choice["text"] == written["text"]
    assert choice["logprobs"]["tokens"] == written["logprobs"]["tokens"]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        written["logprobs"]["token_logprobs"][1:], abs=1e-4
    )
    assert (scored["usage"]["completion_tokens"], choice["finish_reason"]) == (0, "length")
    for start, token in zip(choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"], strict=True):
        assert choice["text"].startswith(token, start)


def test_scoring_with_one_token_more_is_what_lm_eval_asks_for(api: Api) -> None:
    ids = api.ask("tokenize", prompt=PROMPT)["tokens"]
    body: dict[str, Any] = {"prompt": [ids, ids[:1]], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    first, second = api.ask("completions", **body)["choices"]
    assert len(first["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert len(second["logprobs"]["token_logprobs"]) == 2
    for entry, top in zip(first["logprobs"]["token_logprobs"][1:], first["logprobs"]["top_logprobs"][1:], strict=True):
        assert entry <= max(top.values())


def test_a_bias_of_100_decides(api: Api) -> None:
    (token_id,) = api.ask("tokenize", prompt=" lighthouse")["tokens"]
    reply = api.ask("completions", prompt=PROMPT, max_tokens=3, logit_bias={str(token_id): 100})
    assert reply["choices"][0]["text"] == " lighthouse" * 3


def test_a_dry_run_shows_the_prompt_that_is_then_paid_for(api: Api) -> None:
    (inspected,) = api.ask("chat/completions", messages=QUESTION, dry_run=True)["prompts"]
    assert inspected["lint"] == []
    assert [token["role"] for token in inspected["tokens"]].count("user") > 5
    assert api.ask("tokenize", messages=QUESTION)["tokens"] == inspected["ids"]
    usage = api.ask("chat/completions", messages=QUESTION, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == inspected["num_tokens"]


REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("completions", {"prompt": "a", "max_tokens": 2000}, 400, "prompt"),
    ("completions", {"prompt": "a", "n": 9}, 400, "n"),
    ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
    ("chat/completions", {"messages": QUESTION, "modalities": ["audio"]}, 400, "modalities"),
    ("responses", {"input": "a", "previous_response_id": "resp_1"}, 400, "previous_response_id"),
    ("chat/completions", {"messages": [{"role": "tool", "content": "31"}]}, 400, "messages[0].tool_call_id"),
    ("embeddings", {"input": "a"}, 404, None),
]


def test_what_a_request_has_in_common_with_an_earlier_one_is_counted(served: Served, api: Api) -> None:
    prompt = list(range(1000, 1040))
    before = served.gauge("llama_prefix_cache_hits")
    first, again = (api.ask("completions", prompt=prompt, max_tokens=1)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["prompt_tokens_details"]["cached_tokens"] == 32
    wait_until(lambda: served.gauge("llama_prefix_cache_hits") >= before + 32, seconds=5)


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED)
def test_a_mistake_has_openais_shape(api: Api, path: str, body: Any, status: int, param: str | None) -> None:
    for stream in (False, True):
        reply = api.client.post(f"{api.base}/{path}", json={**body, "stream": stream})
        assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json")
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param


@pytest.mark.parametrize("content", [b'{"prompt": "a"', b"caf\xe9", b"", b"[1]", b'"a"'])
def test_a_body_that_is_no_json_object_is_refused(api: Api, content: bytes) -> None:
    reply = api.client.post(f"{api.base}/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_a_stream_frees_its_place(served: Served, api: Api) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "n": 3, "stream": True, "ignore_eos": True}
    with api.client.stream("POST", f"{api.base}/completions", json=body) as reply:
        lines = reply.iter_lines()  # letting go of it leaves
        next(lines)
        wait_until(lambda: served.gauge("llama_requests_running") == 3, seconds=5)
    left = time.monotonic()
    wait_until(lambda: served.gauge("llama_requests_running") == 0, seconds=5)
    # 100 ms on an idle machine; a server that notices only after a second or more fails.
    assert time.monotonic() - left < 1


def test_a_stop_string_is_never_shown_and_ends_the_stream(api: Api) -> None:
    body: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "stop": ["ance is"]}
    (choice,) = api.ask("chat/completions", **body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("The capital of Fr", "stop")
    pieces = [event["choices"][0]["delta"].get("content", "") for event in api.stream("chat/completions", **body)]
    assert "".join(pieces) == "The capital of Fr"


def test_a_schema_is_followed_at_any_temperature(api: Api) -> None:
    schema = {"name": "city", "schema": CITY}
    body: dict[str, Any] = {
        "messages": QUESTION,
        "temperature": 1,
        "n": 4,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    for choice in api.ask("chat/completions", **body, max_tokens=200)["choices"]:
        assert choice["finish_reason"] == "stop", choice
        assert set(json.loads(choice["message"]["content"])) == {"city", "people"}
    assert {choice["finish_reason"] for choice in api.ask("chat/completions", **body, max_tokens=3)["choices"]} == {
        "length"
    }


def test_a_choice_and_a_pattern_are_followed(api: Api) -> None:
    body: dict[str, Any] = {"messages": QUESTION, "n": 3}
    for choice in api.ask("chat/completions", **body, guided_choice=["Lyon", "Nice"])["choices"]:
        assert choice["message"]["content"] in ("Lyon", "Nice")
    for choice in api.ask("chat/completions", **body, guided_regex="[0-9]{3}-[ab]{2}")["choices"]:
        digits, _, letters = choice["message"]["content"].partition("-")
        assert (len(digits), digits.isdigit(), len(letters), set(letters) <= set("ab")) == (3, True, 2, True)


def test_a_forced_call_has_arguments_that_follow_the_tools_schema(api: Api) -> None:
    tool = {"type": "function", "function": {"name": "look_up", "parameters": CITY}}
    body: dict[str, Any] = {"messages": QUESTION, "tools": [tool], "tool_choice": "required", "seed": 3}
    (choice,) = api.ask("chat/completions", **body)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "look_up"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "people"}
    events = [event["choices"][0] for event in api.stream("chat/completions", **body)]
    parts = [part for event in events for part in event["delta"].get("tool_calls", ())]
    assert "".join(part["function"]["arguments"] for part in parts) == call["function"]["arguments"]
    assert events[-1]["finish_reason"] == "tool_calls"


def test_beyond_the_queue_a_call_is_a_503_that_says_so(smollm2_checkpoint: Path) -> None:
    """One call at a time, one in the queue: the others are turned away at once, and the two are answered."""
    config = settings({"deviceType": "cpu", "batchSize": 1, "jobQueueSize": 1}, tensor_parallel_size=1)
    with serving(smollm2_checkpoint, config) as running:
        api = Api(running)
        body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            replies = list(pool.map(lambda _: api.client.post(f"{api.base}/completions", json=body), range(6)))
        statuses = sorted(reply.status_code for reply in replies)
        assert statuses[0] == 200
        assert statuses[-1] == 503
        assert set(statuses) == {200, 503}
        refused = next(reply for reply in replies if reply.status_code == 503)
        assert isinstance(refused, httpx.Response)
        assert "llama" in refused.json()["message"], refused.text
