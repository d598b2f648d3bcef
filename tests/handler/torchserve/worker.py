"""TorchServe's side of a poll, an API that says little, and an engine that says what a test wants."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from ts.context import Context, RequestProcessor

from handler.call import Progress
from handler.errors import RequestError
from handler.service import Service
from handler.torchserve.transport import Transport
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Output, Request
from llama2.engine.service_loop import ServiceLoop
from llama2.errors import InvalidValue


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
            Request(request_id=f"{call_id}/{i}", prompt_ids=(len(text),), params=SamplingParams(n=self.n))
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
            raise InvalidValue("prompt_ids", "must not be 13")
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

    def __init__(self, service: Service | None = None) -> None:
        """Without a `service`, one whose engine is the test's."""
        self.engine = FakeEngine()
        self.transport = Transport(service or Service(cast(ServiceLoop, self.engine), Upper))
        self.live: list[str] = []
        self.unanswered: dict[str, Any] = {}  # bodies, which TorchServe sends until there is a reply
        self.context = Context("llama", "", None, 1, None, "0")

    def poll(self, *arrivals: tuple[str, Any], headers: dict[str, Any] | None = None) -> dict[str, tuple[str, Any]]:
        """Per live request that has a reply: the text, and the criterion."""
        self.live += [call_id for call_id, _ in arrivals]
        self.unanswered |= dict(arrivals)
        data = [{"body": self.unanswered[call_id]} if call_id in self.unanswered else {} for call_id in self.live]
        self.context.request_ids = dict(enumerate(self.live))
        self.context.request_processor = [RequestProcessor(dict(headers or {})) for _ in self.live]
        texts = self.transport.poll(data, self.context)
        assert texts is not None
        assert len(texts) == len(self.live) == len(self.context.stopping_criteria)
        replies = {
            call_id: (text, criterion(text))
            for call_id, text, criterion in zip(self.live, texts, self.context.stopping_criteria, strict=True)
            if text is not None
        }
        self.status = {call_id: self.context.get_response_status(index)[0] for index, call_id in enumerate(self.live)}
        self.live = [call_id for call_id in self.live if call_id not in replies or replies[call_id][1] is False]
        for call_id in replies:
            self.unanswered.pop(call_id, None)
        return replies


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


def eventually(condition: Callable[[], Any]) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen in time")
