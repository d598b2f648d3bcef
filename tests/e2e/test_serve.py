"""A real TorchServe with two ranks and a real model: what it answers, and what it refuses."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.serve import _curl
from tests.e2e.conftest import FOREVER, PROMPT, Served, serving, wait_until
from tests.handler.support import settings

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("has_curl", [True, False])
@pytest.mark.parametrize("file", ["sample_text.txt", "dialogs.txt"])
def test_make_serve_asks_the_shipped_files_with_or_without_curl(
    served: Served, file: str, has_curl: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not has_curl:
        monkeypatch.setattr(shutil, "which", lambda _: None)
    _curl(served.server, file)
    command, _, text = capsys.readouterr().out.strip().partition("\n")
    assert command == f'$ curl -sS {served.url} -H "Authorization: Bearer $KEY" -T {file}'
    reply = json.loads(text)
    chat = file == "dialogs.txt"
    text = reply["generation"]["content"] if chat else reply["generation"]
    assert len(text.split()) > 10
    assert not chat or reply["generation"]["role"] == "assistant"
    assert reply["finish_reason"] in ("stop", "length")
    assert 0 < reply["usage"]["completion_tokens"] <= 50


def test_the_model_knows_the_capital_of_france(served: Served) -> None:
    question = "What is the capital of France? Answer in one sentence."
    reply = served.ask(dialog=[{"role": "user", "content": question}], temperature=0)
    assert reply["generation"]["content"] == "The capital of France is Paris."
    assert reply["finish_reason"] == "stop"


def test_a_plain_text_is_completed(served: Served) -> None:
    with served.client() as client:
        reply = client.put(served.url, content=b"Once upon a time\n")
    assert reply.status_code == 200
    assert reply.json()["usage"]["prompt_tokens"] == 4


def test_a_stream_arrives_piece_by_piece_and_says_what_the_whole_reply_says(served: Served) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_new_tokens": 60, "temperature": 0}
    whole = served.ask(**body)
    arrivals, lines = [], []
    with served.client() as client, client.stream("POST", served.url, json={**body, "stream": True}) as reply:
        assert reply.headers["content-type"] == "application/x-ndjson"
        for line in reply.iter_lines():
            arrivals.append(time.monotonic())
            lines.append(json.loads(line))
    assert "".join(line["text"] for line in lines) == whole["generation"]
    assert (lines[-1]["finish_reason"], lines[-1]["usage"]) == (whole["finish_reason"], whole["usage"])
    assert len(lines) > 20
    assert arrivals[-1] - arrivals[0] > 0.1


def test_sixteen_clients_at_once_each_get_what_they_would_get_alone(served: Served) -> None:
    """Twice as many as are computed together, prompts of one piece and of several, replies of all lengths."""
    bodies = [
        {"prompt": "word " * (1 + 20 * (index % 5)) + PROMPT, "max_new_tokens": 3 + 3 * (index % 7), "temperature": 0}
        for index in range(16)
    ]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda body: served.ask(**body), bodies))
    alone = [served.ask(**body) for body in bodies]
    assert together == alone


def test_a_list_is_answered_in_order(served: Served) -> None:
    prompts = ["One, two, three,", "Monday, Tuesday,", "A, B, C,"]
    listed = served.ask(prompt=prompts, max_new_tokens=8, temperature=0)
    assert listed == [served.ask(prompt=prompt, max_new_tokens=8, temperature=0) for prompt in prompts]


def test_a_seed_gives_the_same_reply_again_and_another_seed_another(served: Served) -> None:
    def say(seed: int) -> str:
        return served.ask(prompt=PROMPT, max_new_tokens=20, temperature=1.0, seed=seed)["generation"]

    assert say(1) == say(1) != say(2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(served: Served, stream: bool) -> None:
    """The last client to leave is the hard case: TorchServe does not poll any more then."""
    with served.client() as client, client.stream("POST", served.url, json={**FOREVER, "stream": stream}) as reply:
        lines = reply.iter_lines()  # letting go of it leaves
        if stream:
            next(lines)
        wait_until(lambda: served.gauge("llama_requests_running") == 1, seconds=5)
    wait_until(lambda: served.gauge("llama_requests_running") == 0, seconds=4)
    assert served.ask(prompt=PROMPT, max_new_tokens=1)["usage"]["completion_tokens"] == 1


LONG = "word " * 1100
BAD: list[tuple[bytes, str, str]] = [
    (b'{"prompt": "a"', "application/json", "not valid JSON: Expecting ',' delimiter at line 1, column 15"),
    (b'{"prompt": "a"', "text/plain", "not valid JSON"),
    (b"hello", "application/json", "not valid JSON"),
    (b"[1]", "application/json", "must be a JSON object"),
    (b"caf\xe9", "text/plain", "not UTF-8: byte 3 is 0xe9"),
    (b'{"prompt": "caf\xe9"}', "application/json", "not UTF-8"),
    (b"", "application/json", "body"),
    (b"{}", "application/json", "prompt or dialog must be in the body"),
    (b'{"prompt": "a", "max_tokens": 5}', "application/json", "did you mean 'max_new_tokens'?"),
    (b'{"prompt": "a", "top_p": "high"}', "application/json", "top_p must be a number"),
    (b'{"prompt": "a", "max_new_tokens": 0}', "application/json", "max_new_tokens must be"),
    (
        b'{"prompt": "a", "stop_token_ids": [99999999]}',
        "application/json",
        "stop_token_ids must hold token ids from 0 to",
    ),
    (b'{"dialog": [{"role": "robot", "content": "Hi"}]}', "application/json", "dialog[0].role must be"),
    (json.dumps({"prompt": LONG}).encode(), "application/json", "tokens, but at most 1023 are taken"),
]


def test_bad_bodies_are_400s_that_say_why_and_a_stream_beside_them_does_not_notice(served: Served) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 150, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool, served.client() as client:
        beside = pool.submit(served.ask, **body)
        wait_until(lambda: served.gauge("llama_requests_running") == 1, seconds=5)
        for content, content_type, message in BAD:
            reply = client.post(served.url, content=content, headers={"Content-Type": content_type})
            assert reply.status_code == 400, (content[:40], reply.text)
            assert reply.headers["content-type"] == "application/json"
            assert message in reply.json()["error"]["message"]
        assert not beside.done(), "the stream should still be running"
        assert beside.result()["usage"]["completion_tokens"] == 150


def test_a_form_or_a_path_that_nobody_serves_is_refused(served: Served) -> None:
    with served.client() as client:
        assert client.get(served.url).status_code == 400
        assert client.post(f"{served.url}/1.0/v2/talk", json={"prompt": "a"}).status_code == 404


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_without_the_key_nobody_is_served(served: Served, headers: dict[str, str]) -> None:
    reply = httpx.post(served.url, json={"prompt": "a"}, headers=headers, trust_env=False)
    assert reply.status_code in (400, 401)
    assert "generation" not in reply.text


def test_environment_and_truncation_take_effect(smollm2_checkpoint: Path) -> None:
    environ = {"MAX_INPUT_TOKEN_LENGTH": "12", "MAX_NEW_TOKENS": "5"}
    config = settings(
        {"deviceType": "cpu"}, tensor_parallel_size=1, truncation="left", mode="chat", special_tags="encode"
    )
    with serving(smollm2_checkpoint, config, environ) as running:
        cut = running.ask(prompt="word " * 100 + "one two three four", mode="text_completion", ignore_eos=True)
        assert cut["usage"] == {"prompt_tokens": 12, "completion_tokens": 5, "truncated_tokens": 92}
        assert running.ask(prompt="Hi <|im_end|>")["generation"]["role"] == "assistant"
