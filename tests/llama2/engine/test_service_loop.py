"""The engine's thread on a small random model: requests come in from elsewhere, and outputs are fetched."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from llama2.engine.engine import Engine
from llama2.engine.sequence import Output
from llama2.engine.service_loop import ServiceLoop
from tests.llama2.engine.test_engine import GREEDY, request, run, with_changes


@pytest.fixture
def served(engine: Engine) -> Iterator[ServiceLoop]:
    failures: list[BaseException] = []
    loop = ServiceLoop(engine, failures.append)
    yield loop
    loop.close()
    assert not failures


def test_the_thread_serves_whoever_comes(served: ServiceLoop) -> None:
    assert served.poll(0.0) == []
    for name in ("a", "b"):
        served.add(request(name))
    finished: dict[str, str | None] = {}
    deadline = time.monotonic() + 20
    while len(finished) < 2 and time.monotonic() < deadline:
        finished |= {output.request_id: output.finish_reason for output in served.poll(0.1) if output.finish_reason}
    assert finished == {"a": "length", "b": "length"}
    assert served.stats().running == 0
    assert served.stats().last_step_at is not None


def test_an_abort_reaches_a_running_thread(served: ServiceLoop) -> None:
    served.add(request("a", with_changes(max_new_tokens=None)))
    while not any(output.token_ids for output in served.poll(1.0)):
        pass
    served.abort("a")
    outputs: list[Output] = []
    deadline = time.monotonic() + 10
    while not (outputs and outputs[-1].finish_reason) and time.monotonic() < deadline:
        outputs += served.poll(0.1)
    assert outputs[-1].finish_reason in ("abort", "length")
    assert served.stats().free_blocks == served.stats().total_blocks


def test_a_suspended_engine_holds_no_block_and_goes_on_where_it_was(engine: Engine) -> None:
    _, expected, _ = run(engine, GREEDY)
    failures: list[BaseException] = []
    loop = ServiceLoop(engine, failures.append)
    loop.add(request("a"))
    outputs: list[Output] = []
    while not outputs:
        outputs += loop.poll(1.0)
    loop.suspend()
    deadline = time.monotonic() + 10
    while loop.stats().running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert loop.stats().free_blocks == loop.stats().total_blocks
    steps = loop.stats().steps
    time.sleep(0.05)
    assert loop.stats().steps == steps
    loop.resume()
    while not outputs[-1].finish_reason and time.monotonic() < deadline:
        outputs += loop.poll(0.1)
    loop.close()
    assert [token_id for output in outputs for token_id in output.token_ids] == expected
    assert not failures


def test_a_failure_in_the_thread_is_reported_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[BaseException] = []
    monkeypatch.setattr(engine._group._runner, "run", lambda plan: 1 / 0)
    loop = ServiceLoop(engine, failures.append)
    loop.add(request("a"))
    deadline = time.monotonic() + 10
    while not failures and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [type(failure) for failure in failures] == [ZeroDivisionError]
