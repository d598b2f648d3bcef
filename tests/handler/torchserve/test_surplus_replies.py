"""TorchServe keeps a lost group's last reply and takes it for the new group's: a poll without a reply mends that."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from ts.context import RequestProcessor

from tests.handler.torchserve.worker import Worker

Replies = dict[str, tuple[str, Any]]


class FrontEnd:
    """TorchServe's worker thread and its queue of replies, which may hold some that nobody waits for."""

    def __init__(self, worker: Worker, surplus: int) -> None:
        self._worker = worker
        self._live: dict[str, Any] = {}  # with its body, until a reply to it has been read
        self.queue: deque[Replies] = deque([{}] * surplus)
        self.texts: dict[str, str] = {}

    def arrive(self, call_id: str, body: Any) -> None:
        self._live[call_id] = {"body": body}
        self.texts[call_id] = ""

    def leave(self, call_id: str) -> None:
        del self._live[call_id]

    def poll(self) -> None:
        if not self._live:
            return
        call_ids, context = list(self._live), self._worker.context
        context.request_ids = dict(enumerate(call_ids))
        context.request_processor = [RequestProcessor({}) for _ in call_ids]
        texts = self._worker.transport.poll([self._live[call_id] for call_id in call_ids], context)
        if texts is not None:
            criteria = context.stopping_criteria
            self.queue.append(
                {
                    call_id: (text, criterion(text))
                    for call_id, text, criterion in zip(call_ids, texts, criteria, strict=True)
                    if text is not None
                }
            )
        assert self.queue, "TorchServe waits for a reply that does not come"
        for call_id, (text, criterion) in self.queue.popleft().items():
            assert call_id in self._live, f"Unexpected job in sendResponse(): {call_id}"
            self.texts[call_id] += text
            self._live[call_id] = {}
            if criterion is not False:
                del self._live[call_id]


@pytest.mark.parametrize("surplus", [0, 1, 2])
def test_whatever_lay_in_the_queue_everybody_gets_their_reply(worker: Worker, surplus: int) -> None:
    front = FrontEnd(worker, surplus)
    front.arrive("a", {"say": ["x"], "stream": True})
    front.arrive("refused", {})
    for text in "ABC":
        worker.engine.say("a/0", text)
        front.poll()
    front.arrive("b", {"say": ["y"]})
    front.poll()
    worker.engine.say("a/0", "", "stop")
    worker.engine.say("b/0", "Y", "stop")
    for _ in range(2):
        front.poll()
    assert front.texts == {"a": "0:A\n0:B\n0:C\n0:\nend\n", "refused": front.texts["refused"], "b": "Y"}
    assert "say something" in front.texts["refused"]
    assert not front.queue


@pytest.mark.parametrize("surplus", [0, 1, 2])
def test_a_client_that_leaves_meanwhile_harms_nobody(worker: Worker, surplus: int) -> None:
    front = FrontEnd(worker, surplus)
    front.arrive("a", {"say": ["x"]})
    for _ in range(surplus + 1):
        front.poll()
    front.leave("a")
    front.poll()
    front.arrive("b", {"say": ["y"]})
    front.poll()
    worker.engine.say("b/0", "Y", "stop")
    front.poll()
    assert front.texts["b"] == "Y"
    assert worker.engine.aborted == ["a/0"]


@pytest.mark.parametrize("surplus", [0, 1, 2])
def test_calls_without_a_body_are_no_exception(worker: Worker, surplus: int) -> None:
    front = FrontEnd(worker, surplus)
    for call_id in "abc":
        front.arrive(call_id, None)
        front._live[call_id] = {}
        for _ in range(surplus + 1):
            front.poll()
        assert "the request has no body" in front.texts[call_id]
