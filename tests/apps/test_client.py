"""Talking to a server: its text as it comes, and plain words for whatever else comes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from apps.client import Reply, Sampling, Server

pytestmark = pytest.mark.clients

SAMPLING = Sampling(temperature=0.5, top_p=0.9, max_tokens=None)
MODELS = json.dumps({"object": "list", "data": [{"id": "llama", "object": "model", "created": 0, "owned_by": "us"}]})


class Script:
    """A server that answers chats with one given status and body, and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.content_type = 200, "", "application/json"
        self.models = MODELS
        self.asked: list[Any] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(200, script.models, "application/json")

            def do_POST(self) -> None:
                script.asked.append((self.headers, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                self._send(script.status, script.body, script.content_type)

            def _send(self, status: int, body: str, content_type: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def stream(self, *chunks: dict[str, Any], done: bool = True) -> None:
        base = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "llama", "choices": []}
        lines = [f"data: {json.dumps(base | chunk)}\n\n" for chunk in chunks]
        self.body, self.content_type = "".join([*lines, "data: [DONE]\n\n" * done]), "text/event-stream"


@pytest.fixture
def script() -> Iterator[Script]:
    made = Script()
    thread = threading.Thread(target=made.http.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.http.shutdown()
    thread.join()
    made.http.server_close()


def replies(base_url: str, api_key: str | None = "key", key_file: Path = Path("none")) -> list[Reply]:
    async def collect() -> list[Reply]:
        server = Server(base_url, api_key=api_key, key_file=key_file)
        return [reply async for reply in server.reply([{"role": "user", "content": "Hi"}], SAMPLING)]

    return asyncio.run(collect())


def delta(content: str | None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]}


def test_each_reply_is_the_whole_text_so_far_and_the_last_has_the_note(script: Script) -> None:
    usage = {"usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
    script.stream(delta(""), delta("Hel"), delta("lo"), delta(None, "length"), usage)
    *growing, last = replies(script.url)
    assert [reply.text for reply in growing] == ["Hel", "Hello"]
    assert last.text == "Hello"
    assert not last.failed
    for words in ("s to first token", "tokens/s", "3 prompt + 2 reply tokens", "cut at the token limit"):
        assert words in last.note


def test_only_what_the_page_chose_is_asked_for(script: Script) -> None:
    script.stream(delta("Hi", "stop"))
    replies(script.url)
    ((_, body),) = script.asked
    assert body == {
        "model": "llama",
        "messages": [{"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_the_key_is_read_from_torchserves_file_at_each_request(script: Script, tmp_path: Path) -> None:
    script.stream(delta("Hi", "stop"))
    key_file = tmp_path / "key_file.json"
    for key in ("old", "new"):
        key_file.write_text(json.dumps({"inference": {"key": key}, "management": {"key": "secret"}}))
        replies(script.url, None, key_file)
        assert script.asked[-1][0]["Authorization"] == f"Bearer {key}"


def error(message: str) -> str:
    return json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})


INVALID_KEY = json.dumps({"code": 400, "type": "InvalidKeyException", "message": "Token Authentication failed."})


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            400,
            error("temperature must be at least 0"),
            "The server refused this request: temperature must be at least 0",
        ),
        (400, INVALID_KEY, "The server refused the key"),
        (401, error("no such key"), "The server refused the key"),
        (404, error("no such model"), "has no such model or address. (no such model)"),
        (429, error("slow down"), "The server is busy, or its model is not ready. Try again in a moment. (slow down)"),
        (503, error("the queue is full"), "The server is busy, or its model is not ready. Try again in a moment. (the"),
        (500, error("Worker died."), "The server failed: Worker died."),
    ],
)
def test_an_error_gets_a_plain_message(script: Script, status: int, body: str, words: str) -> None:
    script.status, script.body = status, body
    (reply,) = replies(script.url)
    assert reply.failed
    assert words in reply.note


def test_a_reply_that_breaks_off_keeps_its_text(script: Script) -> None:
    script.stream(delta("Hel"), {"error": {"message": "the engine has stopped"}}, done=False)
    last = replies(script.url)[-1]
    assert (last.text, last.failed) == ("Hel", True)
    assert last.note == "The server failed: the engine has stopped"


def test_without_a_server_or_a_key_it_says_what_to_do(script: Script, tmp_path: Path) -> None:
    (reply,) = replies("http://127.0.0.1:9")
    assert reply.note == "No server answers at http://127.0.0.1:9. Start one with “make serve”, then try again."
    (reply,) = replies(script.url, None, tmp_path / "key_file.json")
    assert reply.note.startswith("No server of this folder is running. Start one with “make serve”.")


def test_a_server_of_another_kind_is_noticed(script: Script) -> None:
    script.models = '"hello"'
    (reply,) = replies(script.url)
    assert reply.note == f"What answers at {script.url} does not speak OpenAI's API."
