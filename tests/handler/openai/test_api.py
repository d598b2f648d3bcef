"""The paths that need no engine, and how a fault looks to a client."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from handler.errors import RequestError
from handler.openai import api
from llama2.weights.certificate import CERTIFICATE_FILE, write_certificate
from llama2.weights.manifest import Manifest
from tests.handler.openai.support import SAID, USER, Server, make_server
from tests.support.certificates import certificate_of


@pytest.mark.parametrize("prefix", ["v1/", ""])
def test_models_lists_every_name_the_server_answers_to(server: Server, prefix: str) -> None:
    listed = server.get(f"{prefix}models")
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["smol", "llama"]
    for model in listed["data"]:
        assert server.get(f"{prefix}models/{model['id']}") == model
        assert (model["object"], model["max_model_len"]) == ("model", 100)


def test_another_models_description_is_a_404(server: Server) -> None:
    assert server.refused("v1/models/gpt-4")[:2] == (404, "model")


@pytest.mark.parametrize("path", ["v1/embeddings", "v2/models", "v1", "v1/", "v1/chat", "v1/completions/x"])
def test_any_other_path_is_a_404_that_names_it(server: Server, path: str) -> None:
    status, _, message = server.refused(path)
    assert (status, path in message) == (404, True)


@pytest.mark.parametrize("prefix", ["v1/", ""])
def test_a_certificate_is_shown_as_it_was_written(tmp_path: Path, prefix: str) -> None:
    Manifest(tmp_path, {}).write()
    certificate = certificate_of(tmp_path)
    write_certificate(tmp_path, certificate)
    shown = make_server(tmp_path, certificate=certificate).get(f"{prefix}certificate")
    assert json.loads(json.dumps(shown)) == json.loads((tmp_path / CERTIFICATE_FILE).read_text())


def test_without_a_certificate_a_404_says_how_one_is_made(server: Server) -> None:
    status, _, message = server.refused("v1/certificate")
    assert (status, "python -m benchmarks.certify makes one" in message) == (404, True)


def test_tokenize_and_detokenize_undo_each_other(server: Server) -> None:
    ids = server.tokenizer.encode("Hé!")
    reply = server.get("tokenize", prompt="Hé!", return_token_strs=True)
    assert reply == {
        "count": 4,
        "max_model_len": 100,
        "tokens": ids,
        "token_strs": ["H", r"bytes:\xc3", r"bytes:\xa9", "!"],
    }
    assert server.get("detokenize", tokens=ids) == {"prompt": "Hé!"}
    assert server.get("tokenize", prompt="a")["token_strs"] is None


def test_tokenize_of_messages_is_the_prompt_of_a_chat_with_its_inspection(server: Server) -> None:
    reply = server.get("v1/tokenize", messages=[USER])
    assert reply["tokens"] == list(server.request("v1/chat/completions", messages=[USER]).prompt_ids)
    assert reply["count"] == len(reply["tokens"])
    assert reply["inspection"]["ids"] == reply["tokens"]
    assert server.get("detokenize", tokens=reply["tokens"]) == {"prompt": SAID}


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[index % 2], "content": f"<{index}>"} for index in range(number)]


def test_tokenize_takes_time_in_proportion_to_the_number_of_messages(tmp_path: Path) -> None:
    """A quadratic share would be 20 s here."""
    server = make_server(tmp_path, truncation="left")
    server.get("v1/tokenize", messages=[USER])  # imports
    start = time.process_time()
    tokens = server.get("v1/tokenize", messages=turns(8999))["inspection"]["tokens"]
    assert time.process_time() - start < 5
    said = [token["text"] for token in tokens if token["role"] in ("user", "assistant")]
    assert "".join(said) == "".join(f"<{index}>" for index in range(8999))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("v1/tokenize", {"prompt": "a" * 5_000_000}),
        ("v1/tokenize", {"messages": [{"role": "user", "content": "a" * 5_000_000}]}),
        ("v1/completions", {"prompt": ["word " * 1_000_000]}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 5_000_000}]}),
    ],
)
def test_a_text_that_is_too_long_is_refused_before_it_is_tokenized(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, body: Any
) -> None:
    monkeypatch.delattr(type(server.tokenizer), "_encode")
    status, param, message = server.refused(path, **body)
    assert (status, str(param).partition("[")[0] in body) == (400, True)
    assert re.search(r"has at least 50000\d\d tokens, but at most 99 are taken$", message)


def test_a_text_that_the_body_cuts_may_be_of_any_length(server: Server) -> None:
    long = "a" * 10_000
    request = server.request("v1/completions", prompt=long, truncate_prompt_tokens=5)
    assert len(request.prompt_ids) == 5
    request = server.request("v1/chat/completions", messages=[USER | {"content": long}], truncate_prompt_tokens=5)
    assert len(request.prompt_ids) == 5


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("tokenize", {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ("tokenize", {"messages": [USER], "add_generation_prompt": False}, "add_generation_prompt"),
        ("tokenize", {"messages": [USER], "chat_template": "{{ 1 }}"}, "chat_template"),
        ("tokenize", {"messages": [USER], "chat_template_kwargs": {"tools": 1}}, "chat_template_kwargs"),
        ("tokenize", {"prompt": "a", "text": "a"}, "text"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [99999]}, "tokens[0]"),
        ("detokenize", {"tokens": ["a"]}, "tokens[0]"),
    ],
)
def test_a_mistake_is_refused_and_named(server: Server, path: str, body: Any, param: str) -> None:
    assert server.refused(path, **body)[:2] == (400, param)


@pytest.mark.parametrize("body", ["a text", [1], 5, None])
def test_a_body_that_is_no_object_is_refused(server: Server, body: Any) -> None:
    with pytest.raises(RequestError, match="must be a JSON object") as caught:
        server.api.read("v1/completions", lambda: body)
    assert caught.value.status == 400


def test_health_tells_how_the_engine_is(server: Server) -> None:
    server.stats.running, server.stats.waiting, server.stats.steps = 2, 1, 7
    server.stats.last_step_at = time.monotonic() - 0.5
    health = server.get("health")
    assert 0.5 <= health.pop("last_step_age") < 5
    assert health == {
        "status": "ok",
        "running": 2,
        "waiting": 1,
        "steps": 7,
    }


def test_an_engine_that_has_work_and_makes_no_steps_is_not_healthy(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is idle, or that has moved since it was last asked, is."""
    server.stats.running = 1
    server.get("health")
    monkeypatch.setattr(api, "STALL_SECONDS", 0.0)
    assert server.refused("health")[0] == 503
    server.stats.steps += 1
    assert server.get("health")["status"] == "ok"
    server.stats.running = 0
    assert server.get("health")["status"] == "ok"


def test_an_error_has_openais_shape(server: Server) -> None:
    with pytest.raises(RequestError) as caught:
        server.read("v1/completions", prompt="a", model="gpt-4")
    error = json.loads(caught.value.as_json())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "model", "model_not_found")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "invalid_request_error"),
     (429, "rate_limit_error"), (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_an_errors_type_follows_from_its_status(status: int, kind: str) -> None:
    assert json.loads(RequestError("", status=status).as_json())["error"]["type"] == kind


def test_an_error_can_name_a_field_that_is_not_unicode(server: Server) -> None:
    with pytest.raises(RequestError) as caught:
        server.read("v1/completions", **{"prompt": "a", "\ud800": 1})
    caught.value.as_json().encode()


@pytest.mark.parametrize("stream", [True, False])
def test_a_failure_under_way_ends_a_stream_as_openai_does(server: Server, stream: bool) -> None:
    form = server.read("v1/completions", prompt="a", stream=stream)
    told = form.failure(RequestError("it broke", status=500))
    event, *rest = told.removesuffix("\n").split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == "it broke"
    assert rest == (["data: [DONE]\n"] if stream else [])


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_left_its_grammar_is_an_error(server: Server, stream: bool) -> None:
    with pytest.raises(RequestError, match="could not be held to its grammar"):
        (server.stream if stream else server.say)("v1/completions", "x", prompt="a", finish_reason="error")
