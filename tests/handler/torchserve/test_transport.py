"""What goes back to each client of a poll, and with which criterion and status."""

from __future__ import annotations

import json

import pytest

from handler import service
from tests.handler.torchserve.worker import Worker


def test_an_accepted_call_first_gets_an_empty_piece_and_its_reply_as_the_last_one(worker: Worker) -> None:
    assert worker.poll(("a", {"say": ["x"]})) == {"a": ("", False)}
    worker.engine.say("a/0", "X")
    assert worker.poll() == {"a": ("", False)}
    worker.engine.say("a/0", "Y", "stop")
    assert worker.poll() == {"a": ("XY", True)}
    assert worker.poll() == {}


def test_a_call_that_is_done_at_once_is_one_whole_reply(worker: Worker) -> None:
    worker.engine.say("a/0", "X", "stop")
    assert worker.poll(("a", {"say": ["x"]})) == {"a": ("X", None)}


def test_an_id_that_comes_again_has_a_status_again(worker: Worker) -> None:
    worker.engine.say("a/0", "X", "stop")
    worker.poll(("a", {"say": ["x"]}))
    worker.poll(("b", {"say": ["x"]}))
    worker.engine.say("a/0", "X", "stop")
    assert worker.poll(("a", {"say": ["x"]}))["a"] == ("X", None)


def test_a_stream_sends_what_is_new_and_nothing_twice(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x", "y"], "stream": True}))
    worker.engine.say("a/1", "Y")
    worker.engine.say("a/0", "X")
    assert worker.poll() == {"a": ("1:Y\n0:X\n", False)}
    assert worker.poll() == {"a": ("", False)}
    worker.engine.say("a/0", "", "stop")
    assert worker.poll() == {"a": ("0:\n", False)}
    worker.engine.say("a/1", "", "length")
    assert worker.poll() == {"a": ("1:\nend\n", True)}


def test_a_list_is_answered_when_its_last_prompt_is(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x", "y"]}))
    worker.engine.say("a/1", "Y", "stop")
    assert worker.poll() == {"a": ("", False)}
    worker.engine.say("a/0", "X", "stop")
    assert worker.poll() == {"a": ("X,Y", True)}


def test_several_replies_to_each_prompt_are_counted_through(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x", "y"], "n": 2, "stream": True}))
    for request_id, index in (("a/1", 1), ("a/0", 1), ("a/1", 0), ("a/0", 0)):
        worker.engine.say(request_id, f"{request_id}-{index}", "stop", index)
    assert worker.poll() == {"a": ("3:a/1-1\n1:a/0-1\n2:a/1-0\n0:a/0-0\nend\n", True)}


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_that_cannot_be_written_fails_its_own_call_alone(worker: Worker, stream: bool) -> None:
    worker.poll(("a", {"say": ["x"], "stream": stream}), ("b", {"say": ["y"]}))
    worker.engine.say("a/0", "?")
    worker.engine.say("a/0", "" if not stream else "?", "stop")
    worker.engine.say("b/0", "Y")
    assert worker.poll() == {
        "a": ("500: the server failed on this request; its log says why\n", True),
        "b": ("", False),
    }
    assert worker.engine.aborted == ["a/0"]
    worker.engine.say("a/0", "", "abort")
    worker.engine.say("b/0", "", "stop")
    assert worker.poll() == {"b": ("Y", True)}


def test_a_refused_body_gets_its_own_status_and_nobody_else_notices(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    worker.engine.say("a/0", "X")
    replies = worker.poll(("b", {"sya": ["x"]}), ("c", {"say": ["z"]}))
    text, criterion = replies.pop("b")
    assert (json.loads(text)["error"]["message"], criterion) == ("say something", None)
    assert replies == {"a": ("", False), "c": ("", False)}
    assert worker.status == {"a": 200, "b": 400, "c": 200}
    assert worker.engine.live.keys() == {"a/0", "c/0"}


def test_what_the_engine_refuses_is_a_400_and_the_rest_of_the_list_is_aborted(worker: Worker) -> None:
    text, criterion = worker.poll(("a", {"say": ["x", "x" * 13]}))["a"]
    assert ("prompt_ids must not be 13" in text, criterion, worker.status["a"]) == (True, None, 400)
    assert "a/0" in worker.engine.aborted


def test_a_fault_of_the_server_itself_is_a_500_for_that_request_alone(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    assert worker.poll(("b", "a text"))["b"][1] is None
    assert worker.status["b"] == 500
    assert worker.live == ["a"]


def test_a_body_may_be_a_form_field_and_is_json_if_its_part_says_so(worker: Worker) -> None:
    """TorchServe parses what it can, and hands over the part's headers under the name of the body."""
    json_part = {"body": {"content-type": "application/json; charset=utf-8"}}
    text, criterion = worker.poll(("a", b"no JSON"), headers=json_part)["a"]
    assert ("not valid JSON" in text, criterion, worker.status["a"]) == (True, None, 400)
    worker.context.request_ids = {0: "b"}
    assert worker.transport.poll([{"data": {"say": ["x"]}}], worker.context) == [""]
    assert "b/0" in worker.engine.live


def test_a_path_behind_the_models_own_is_a_404(worker: Worker) -> None:
    text, criterion = worker.poll(("a", {"say": ["x"]}), headers={"url_path": "v2/talk"})["a"]
    assert ("v2/talk" in text, criterion, worker.status["a"]) == (True, None, 404)


def test_a_client_that_left_is_aborted_and_what_still_comes_for_it_is_ignored(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x", "y"]}), ("b", {"say": ["z"]}))
    worker.live = ["b"]
    worker.engine.say("a/0", "X")
    assert worker.poll() == {"b": ("", False)}
    assert worker.engine.aborted == ["a/0", "a/1"]
    worker.engine.say("a/0", "", "abort")
    assert worker.poll() == {"b": ("", False)}


def test_outputs_are_given_to_the_call_whose_id_they_carry_even_if_ids_hold_slashes(worker: Worker) -> None:
    worker.poll(("a/0", {"say": ["x"]}), ("a", {"say": ["x"]}))
    worker.engine.say("a/0/0", "X", "stop")
    assert worker.poll() == {"a/0": ("X", True), "a": ("", False)}


def test_beyond_so_many_replies_at_once_a_call_is_told_to_retry(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single call is always allowed."""
    monkeypatch.setattr(service, "MAX_REPLIES", 3)
    assert worker.poll(("a", {"say": ["x", "y"], "n": 2})) == {"a": ("", False)}
    replies = worker.poll(("b", {"say": ["z"]}))
    assert json.loads(replies["b"][0])["error"]["code"] == "rate_limit_exceeded"
    assert worker.status["b"] == 429
    for index in (0, 1):
        worker.engine.say("a/0", "", "stop", index)
        worker.engine.say("a/1", "", "stop", index)
    worker.poll()
    assert worker.poll(("c", {"say": ["z"]})) == {"c": ("", False)}
