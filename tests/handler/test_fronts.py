"""A front is thin: two of them serve the same replies from one service, which knows neither."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from handler.service import Service
from llama2.weights.certificate import CERTIFICATE_FILE
from llama2.weights.manifest import Manifest
from tests.handler.asyncio_front import AsyncioFront
from tests.handler.support import byte_tokenizer, config
from tests.handler.torchserve.worker import Worker
from tests.support.certificates import certificate_of
from tests.support.checkpoints import write_checkpoint
from tests.support.weights import random_weights, tiny_args

PROMPT = "The capital of France is"
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(folder)
    args = tiny_args(vocab_size=260, context_length=6000)
    write_checkpoint(folder, args, random_weights(args))
    failures: list[BaseException] = []
    service = Service.load(
        config(folder, max_seq_len=6000, max_batch_size=4, dtype="float32"), names=("tiny",), on_failure=failures.append
    )
    yield service
    service.close()
    assert not failures


def test_a_service_refuses_a_certificate_of_other_weights_before_a_rank_starts(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    args = tiny_args(vocab_size=260)
    write_checkpoint(tmp_path, args, random_weights(args))
    Manifest(tmp_path, {}).write()
    (tmp_path / "archive").mkdir()
    content = {**certificate_of(tmp_path).to_json(), "weights": "of another folder"}
    (tmp_path / "archive" / CERTIFICATE_FILE).write_text(json.dumps(content))
    before = psutil.Process().children()
    with pytest.raises(ValueError, match=r"certificate.json is not about the weights in .*: remove it, or measure"):
        Service.load(config(tmp_path), names=("tiny",), certificate_dir=tmp_path / "archive")
    assert psutil.Process().children() == before


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with AsyncioFront(service).serving() as url:
        yield url


def through_torchserve(service: Service, path: str, body: dict[str, Any]) -> str:
    """The whole reply, piece after piece, of a front that is polled."""
    worker = Worker(service)
    text, criterion = worker.poll(("polled", body), headers={"url_path": path})["polled"]
    assert worker.status == {"polled": 200}
    while criterion is False:
        piece, criterion = worker.poll(headers={"url_path": path})["polled"]
        text += piece
    return text


BODIES: list[tuple[str, dict[str, Any]]] = [
    ("", {"prompt": PROMPT, "max_new_tokens": 24, **GREEDY}),
    ("", {"prompt": [PROMPT, "x"], "max_new_tokens": 24, "stream": True, **GREEDY}),
    ("v1/completions", {"prompt": PROMPT, "max_tokens": 24, **GREEDY}),
    ("v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 24, "stream": True}),
    ("v1/completions", {"prompt": "x", "max_tokens": 12, "guided_regex": "[ab]{8}", "temperature": 0}),
    ("v1/tokenize", {"prompt": PROMPT}),
]


def said(reply: str) -> list[Any]:
    """Every text of a reply, whole or streamed, and all else that does not depend on its time and id."""
    lines = [line.removeprefix("data: ") for line in reply.splitlines() if line not in ("", "data: [DONE]")]
    parsed = [json.loads(line) for line in lines]
    return sorted(
        json.dumps({key: value for key, value in one.items() if key not in ("id", "created")}) for one in parsed
    )


@pytest.mark.parametrize(("path", "body"), BODIES)
def test_two_fronts_give_the_same_replies(service: Service, tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    body = {**body, "seed": 5} if path != "v1/tokenize" else body
    polled = through_torchserve(service, path, body)
    with AsyncioFront(service).serving() as url:
        reply = httpx.post(f"{url}/{path}", json=body, timeout=60, trust_env=False)
    assert reply.status_code == 200
    assert len(said(polled)) >= 1
    assert said(reply.text) == said(polled)


def test_a_fault_has_its_status_and_field_at_every_front(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        wrong = client.post("/", json={"prompt": PROMPT, "top_p": 2})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "top_p")
        late = client.post("/v1/completions", json={"prompt": "x", "guided_regex": "("})
        assert (late.status_code, late.json()["error"]["param"]) == (400, "guided_regex")
        assert client.get("/v1/nothing").status_code == 404


def test_a_client_that_leaves_is_aborted(service: Service, url: str) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": None, "stream": True, **GREEDY}
    before = service.loop.stats().steps
    with httpx.stream("POST", f"{url}/", json=body, timeout=60, trust_env=False) as reply:
        first = next(reply.iter_lines())
        assert service.loop.stats().running == 1, first
    while service.loop.stats().running:
        time.sleep(0.01)
    assert service.loop.stats().steps - before < 3000, "the whole reply has nearly 6000 tokens"
    assert service.loop.stats().free_blocks == service.loop.stats().total_blocks
