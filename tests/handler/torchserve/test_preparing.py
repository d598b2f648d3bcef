"""Calls that need something before the engine: they hold up nobody, and a fault found in time has a status."""

from __future__ import annotations

import json

import pytest

from handler.torchserve import transport
from tests.handler.torchserve.worker import Gate, Worker, eventually, refuse


def test_what_is_prepared_in_a_moment_begins_at_once_or_is_refused_with_a_status(worker: Worker) -> None:
    replies = worker.poll(("a", {"say": ["x"], "prepare": lambda: None}), ("b", {"say": ["y"], "prepare": refuse}))
    assert replies["a"] == ("", False)
    assert json.loads(replies["b"][0])["error"]["param"] == "say"
    assert (replies["b"][1], worker.status) == (None, {"a": 200, "b": 400})
    assert worker.engine.live.keys() == {"a/0"}


def test_what_takes_longer_to_prepare_has_no_reply_yet_and_keeps_nobody_waiting(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.poll(("a", {"say": ["x"]}))
    monkeypatch.setattr(transport, "PREPARE_SECONDS", 0.001)
    gate = Gate()
    assert worker.poll(("b", {"say": ["y"], "prepare": gate})) == {"a": ("", False)}
    worker.engine.say("a/0", "X", "stop")
    assert worker.poll() == {"a": ("X", True)}
    assert worker.engine.live.keys() == {"a/0"}
    gate.open()
    eventually(lambda: worker.poll() == {"b": ("", False)} and "b/0" in worker.engine.live)
    worker.engine.say("b/0", "Y", "stop")
    assert worker.poll() == {"b": ("Y", True)}


def test_what_cannot_be_prepared_after_all_still_has_a_status(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ALONE_SECONDS", 0.001)
    gate = Gate(refuse)
    assert worker.poll(("a", {"say": ["x"], "prepare": gate})) == {}
    gate.open()
    eventually(lambda: "a" in worker.poll())
    assert worker.status["a"] == 400


def test_a_client_that_leaves_during_preparation_is_forgotten(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PREPARE_SECONDS", 0.1)
    gate = Gate()
    worker.poll(("a", {"say": ["x"], "prepare": gate}), ("b", {"say": ["y"]}))
    worker.live = ["b"]
    assert worker.poll() == {"b": ("", False)}
    gate.open()
    assert worker.poll() == {"b": ("", False)}
    assert worker.engine.live.keys() == {"b/0"}
