from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ts.context import Context, RequestProcessor

from handler.call import Progress
from handler.errors import RequestError
from handler.torchserve import transport
from handler.torchserve.transport import Transport
from llama2.engine.sequence import Output, Request


class Upper:
    """An API for tests: {"say": ["a", "b"], "stream": …} is one request for each; a reply is their texts, joined."""

    content_type = "text/plain"

    def __init__(self, path: str, read: Callable[[], Any]) -> None:
        if path:
            raise RequestError(f"there is nothing at {path!r}", status=404)
        body = read()
        if not isinstance(body, dict):
            raise TypeError("a fault of the API itself")
        if "say" not in body:
            raise RequestError("say something", param="say")
        self.prompts = body["say"]
        self.stream = body.get("stream", False)

        self.n = body.get("n", 1)
        self.prepare = body.get("prepare")

    def requests(self, call_id: str) -> list[Request]:
        return [
            Request(request_id=f"{call_id}/{i}", prompt_ids=(len(text),), n=self.n)
            for i, text in enumerate(self.prompts)
        ]

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        if output.text == "?":
            raise KeyError("a fault of the API itself")
        return f"{index}:{output.text}\n"

    def whole(self, progress: Sequence[Progress]) -> str:
        if any(done.text == "?" for done in progress):
            raise KeyError("a fault of the API itself")
        return "end\n" if self.stream else ",".join(done.text for done in progress)

    def failure(self, error: RequestError) -> str:
        return f"{error.status}: {error}\n"


class FakeEngine:
    """Records what it is told; a test says what it gives."""

    def __init__(self) -> None:
        self.live: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.ready: list[Output] = []
        self.waits: list[float] = []
        self.suspended = False

    def add(self, request: Request) -> None:
        if request.prompt_ids == (13,):
            raise ValueError("the engine takes no 13")
        self.live[request.request_id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)

    def suspend(self) -> None:
        self.suspended = True

    def resume(self) -> None:
        self.suspended = False

    def poll(self, timeout: float) -> list[Output]:
        self.waits.append(timeout)
        ready, self.ready = self.ready, []
        return ready

    def say(self, request_id: str, text: str, finish_reason: Any = None, index: int = 0) -> None:
        output = Output(request_id=request_id, index=index, text=text, token_ids=(1,), finish_reason=finish_reason)
        self.ready.append(output)


class Worker:
    """TorchServe's side: hands over all live requests at each poll, and drops those that have had their last reply."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.transport = Transport(self.engine, Upper)
        self.live: list[str] = []
        self.context = Context("llama", "", None, 1, None, "0")

    def poll(self, *arrivals: tuple[str, Any], headers: dict[str, Any] | None = None) -> dict[str, tuple[str, Any]]:
        """Per live request: the text, and the criterion."""
        self.live += [call_id for call_id, _ in arrivals]
        bodies = dict(arrivals)
        data = [{"body": bodies[call_id]} if call_id in bodies else {} for call_id in self.live]
        self.context.request_ids = dict(enumerate(self.live))
        self.context.request_processor = [RequestProcessor(dict(headers or {})) for _ in self.live]
        texts = self.transport.poll(data, self.context)
        assert len(texts) == len(self.live) == len(self.context.stopping_criteria)
        criteria = [criterion(text) for criterion, text in zip(self.context.stopping_criteria, texts, strict=True)]
        replies = dict(zip(self.live, zip(texts, criteria, strict=True), strict=True))
        self.status = {call_id: self.context.get_response_status(index)[0] for index, call_id in enumerate(self.live)}
        self.live = [call_id for call_id, (_, criterion) in replies.items() if criterion is False]
        return replies


@pytest.fixture
def worker() -> Worker:
    return Worker()


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


def refuse() -> None:
    raise RequestError("that cannot be prepared", param="say")


class Gate:
    """A preparation that ends when the test says so."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.opened = threading.Event()
        self.passed = threading.Event()
        self._then = then

    def __call__(self) -> None:
        self.opened.wait(10)
        try:
            self._then()
        finally:
            self.passed.set()

    def open(self) -> None:
        self.opened.set()
        assert self.passed.wait(10)


def test_what_is_prepared_in_a_moment_begins_at_once_or_is_refused_with_a_status(worker: Worker) -> None:
    replies = worker.poll(("a", {"say": ["x"], "prepare": lambda: None}), ("b", {"say": ["y"], "prepare": refuse}))
    assert replies["a"] == ("", False)
    assert json.loads(replies["b"][0])["error"]["param"] == "say"
    assert (replies["b"][1], worker.status) == (None, {"a": 200, "b": 400})
    assert worker.engine.live.keys() == {"a/0"}


def test_what_takes_longer_to_prepare_keeps_nobody_waiting(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    gate = Gate()
    assert worker.poll(("b", {"say": ["y"], "prepare": gate})) == {"a": ("", False), "b": ("", False)}
    worker.engine.say("a/0", "X", "stop")
    assert worker.poll() == {"a": ("X", True), "b": ("", False)}
    assert worker.engine.live.keys() == {"a/0"}
    gate.open()
    eventually(lambda: worker.poll() == {"b": ("", False)} and "b/0" in worker.engine.live)
    worker.engine.say("b/0", "Y", "stop")
    assert worker.poll() == {"b": ("Y", True)}


def test_what_cannot_be_prepared_after_all_is_told_in_the_body(worker: Worker) -> None:
    gate = Gate(refuse)
    worker.poll(("a", {"say": ["x"], "prepare": gate}))
    gate.open()
    eventually(lambda: worker.poll() == {"a": ("400: that cannot be prepared\n", True)})
    assert worker.status["a"] == 200


def test_a_client_that_leaves_during_preparation_is_forgotten(worker: Worker) -> None:
    gate = Gate()
    worker.poll(("a", {"say": ["x"], "prepare": gate}), ("b", {"say": ["y"]}))
    worker.live = ["b"]
    assert worker.poll() == {"b": ("", False)}
    gate.open()
    assert worker.poll() == {"b": ("", False)}
    assert worker.engine.live.keys() == {"b/0"}


def eventually(condition: Callable[[], Any]) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about in time")


def test_beyond_so_many_replies_at_once_a_call_is_told_to_come_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call alone may always be made."""
    monkeypatch.setattr(transport, "MAX_REPLIES", 3)
    assert worker.poll(("a", {"say": ["x", "y"], "n": 2})) == {"a": ("", False)}
    replies = worker.poll(("b", {"say": ["z"]}))
    assert json.loads(replies["b"][0])["error"]["code"] == "rate_limit_exceeded"
    assert worker.status["b"] == 429
    for index in (0, 1):
        worker.engine.say("a/0", "", "stop", index)
        worker.engine.say("a/1", "", "stop", index)
    worker.poll()
    assert worker.poll(("c", {"say": ["z"]})) == {"c": ("", False)}


def test_a_refused_body_gets_its_own_status_and_nobody_else_notices(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    worker.engine.say("a/0", "X")
    replies = worker.poll(("b", {"sya": ["x"]}), ("c", {"say": ["z"]}))
    text, criterion = replies.pop("b")
    assert (json.loads(text)["error"]["message"], criterion) == ("say something", None)
    assert replies == {"a": ("", False), "c": ("", False)}
    assert worker.status == {"a": 200, "b": 400, "c": 200}
    assert worker.engine.live.keys() == {"a/0", "c/0"}


def test_a_refusal_is_not_kept_waiting_for_the_engine(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    worker.poll(("b", {}))
    assert worker.engine.waits == [transport.POLL_SECONDS, 0]


def test_a_poll_lasts_until_shortly_before_the_next_news_unless_somebody_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """News come at 1.00 s and 1.05 s; so the next are expected at 1.10 s, and the wait for them ends at 1.09 s."""
    clock: Any = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(transport, "time", clock)
    worker = Worker()

    def wait(now: float, *arrivals: tuple[str, Any], news: bool = False) -> float:
        clock.now = now
        if news:
            worker.engine.say("a/0", "x")
        worker.poll(*arrivals)
        return worker.engine.waits[-1]

    least = transport.POLL_SECONDS
    assert wait(0.9, ("a", {"say": ["x"], "stream": True})) == least
    assert wait(1.0, news=True) == least, "what came before was no step"
    assert wait(1.05, news=True) == least
    assert wait(1.06) == pytest.approx(1.09 - 1.06)
    assert wait(1.07, ("b", {"say": ["x"]})) == least
    assert wait(1.08) == pytest.approx(1.09 - 1.08)
    assert wait(1.3) == least, "they are late"


def test_what_the_engine_refuses_is_a_400_and_the_rest_of_the_list_is_taken_back(worker: Worker) -> None:
    text, criterion = worker.poll(("a", {"say": ["x", "x" * 13]}))["a"]
    assert ("the engine takes no 13" in text, criterion, worker.status["a"]) == (True, None, 400)
    assert "a/0" in worker.engine.aborted


def test_a_fault_of_the_server_itself_is_a_500_for_that_request_alone(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    assert worker.poll(("b", "a text"))["b"][1] is None
    assert worker.status["b"] == 500
    assert worker.live == ["a"]


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


def test_when_the_last_client_has_left_silence_aborts_it_once(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.poll(("a", {"say": ["x"]}))
    worker.transport.watch()
    assert worker.engine.aborted == []
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.0)
    worker.transport.watch()
    worker.transport.watch()
    assert worker.engine.aborted == ["a/0"]
    worker.live = []
    assert worker.poll(("b", {"say": ["x"]})) == {"b": ("", False)}


def test_a_short_silence_makes_the_engine_pause_until_the_next_poll(
    worker: Worker,
) -> None:
    def look(times: int) -> bool:
        for _ in range(times):
            worker.transport.watch()
        return worker.engine.suspended

    assert not look(2 * transport.QUIET_LOOKS), "there was nobody"
    worker.poll(("a", {"say": ["x"]}))
    assert not look(transport.QUIET_LOOKS - 1)
    worker.poll()
    assert not look(transport.QUIET_LOOKS - 1)
    assert look(1)
    assert worker.engine.aborted == []
    worker.poll()
    assert not worker.engine.suspended


def test_a_client_that_was_taken_for_gone_is_told_so(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.poll(("a", {"say": ["x"]}))
    monkeypatch.setattr(transport, "SILENCE_SECONDS", 0.0)
    worker.transport.watch()
    worker.engine.say("a/0", "", "abort")
    text, last = worker.poll()["a"]
    assert (text, last) == ("503: the server was held up and gave this request up\n", True)


def test_outputs_are_given_to_the_call_whose_id_they_carry_even_if_ids_hold_slashes(worker: Worker) -> None:
    worker.poll(("a/0", {"say": ["x"]}), ("a", {"say": ["x"]}))
    worker.engine.say("a/0/0", "X", "stop")
    assert worker.poll() == {"a/0": ("X", True), "a": ("", False)}
