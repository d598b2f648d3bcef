"""How long a poll waits, and what happens when none comes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from handler.torchserve import transport
from tests.handler.torchserve.worker import Worker


def test_a_refusal_is_not_kept_waiting_for_the_engine(worker: Worker) -> None:
    worker.poll(("a", {"say": ["x"]}))
    worker.poll(("b", {}))
    assert worker.engine.waits == [transport.POLL_SECONDS, 0]


def test_a_poll_lasts_until_shortly_before_the_next_news_unless_somebody_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """News comes at 1.00 s and 1.05 s, so the next is expected at 1.10 s, and the wait for it ends at 1.09 s."""
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
    assert wait(1.3) == least, "it is late"


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
