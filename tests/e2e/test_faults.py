"""A real TorchServe is attacked, and its ranks die or hang: nothing of it can be reached, everybody gets an end."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import FOREVER, PROMPT, SETTINGS, Served, serving, wait_until

pytestmark = pytest.mark.integration

STEP_TIMEOUT = 4


@pytest.fixture(scope="module")
def served(smollm2_checkpoint: Path) -> Iterator[Served]:
    settings = copy.deepcopy(SETTINGS)
    settings["handler"]["step_timeout"] = STEP_TIMEOUT
    with serving(smollm2_checkpoint, settings) as running:
        yield running


def first_draw(served: Served) -> str:
    """The first request without a seed draws what manual_seed gives again after each start."""
    served.server.wait_ready("llama", timeout=60)
    return served.ask(prompt=PROMPT, max_new_tokens=20, temperature=1.0)["generation"]


def test_nothing_listens_but_on_this_machine(served: Served) -> None:
    listening = {
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in served.server.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {name for name, _ in listening} >= {"java"}, "or the test looks at the wrong processes"
    assert len(served.server.processes()) == 4, "Java, its worker, and two ranks"
    assert {address for _, address in listening} == {"127.0.0.1"}


class Stream:
    """A reply that is read as it comes; `gap` is the longest time between two pieces."""

    def __init__(self, served: Served) -> None:
        self._client = served.client()
        self._url = served.url
        self._ended = threading.Event()
        self.pieces = 0
        self.gap = 0.0

    @contextlib.contextmanager
    def reading(self) -> Iterator[Stream]:
        thread = threading.Thread(target=self._read)
        thread.start()
        wait_until(lambda: self.pieces > 20, seconds=20)
        self.gap = 0.0
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            self._client.close()

    def _read(self) -> None:
        while not self._ended.is_set():
            last = time.monotonic()
            with self._client.stream("POST", self._url, json={**FOREVER, "stream": True}) as reply:
                for _ in reply.iter_lines():
                    now = time.monotonic()
                    self.gap, last = max(self.gap, now - last), now
                    self.pieces += 1
                    if self._ended.is_set():
                        return


MESSAGES = [{"role": ("user", "assistant")[index % 2], "content": "a " * 5} for index in range(9001)]
LARGE: list[tuple[str, dict[str, Any]]] = [
    ("/1.0/v1/tokenize", {"messages": MESSAGES}),
    ("/1.0/v1/chat/completions", {"messages": MESSAGES}),
    ("/1.0/v1/tokenize", {"prompt": "The quick brown fox. " * 250_000}),
    ("", {"prompt": "The quick brown fox. " * 250_000}),
    ("", {"prompt": "x", "stop": ["y" * 10] * 400_000}),
    ("", {"prompt": "x", "logprobs": [[]] * 1_000_000}),
]


@pytest.mark.parametrize(("path", "body"), LARGE, ids=lambda one: one if isinstance(one, str) else ",".join(one))
def test_a_large_body_holds_up_no_stream(served: Served, path: str, body: dict[str, Any]) -> None:
    """Such bodies held up everybody for 2 to 11 seconds. A step takes some 20 ms here, and two ranks take two cores:
    the rest of the bound is for a busy machine, which holds up now and then, and not each time."""
    content = json.dumps(body).encode()
    gaps = []
    with Stream(served).reading() as stream, served.client() as client:
        for _ in range(4):
            stream.gap = 0.0
            client.post(served.url + path, content=content, headers={"Content-Type": "application/json"})
            time.sleep(0.1)
            gaps.append(stream.gap)
    assert min(gaps) < 0.4, gaps


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_what_runs_and_the_group_comes_back_once_and_as_it_was(served: Served, victim: int) -> None:
    before = first_draw(served)
    with ThreadPoolExecutor(2) as pool, served.client() as client:
        whole = pool.submit(client.post, served.url, json=FOREVER)
        with client.stream("POST", served.url, json={**FOREVER, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(served.rank_pid(victim), signal.SIGKILL)
            *_, last = lines
        assert json.loads(last)["error"]["code"] == 503
        assert "the engine has failed" in whole.result(timeout=10).text
    wait_until(lambda: not served.server.ready("llama"), seconds=10)
    assert f"rank {victim} was killed by SIGKILL" in served.server.model_log()
    assert len(before) > 0
    first_draw(served)
    ranks = [served.rank_pid(rank) for rank in (0, 1)]
    for _ in range(4):
        served.ask(prompt=PROMPT, max_new_tokens=5)
    assert [served.rank_pid(rank) for rank in (0, 1)] == ranks, "it came back once"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_hung_rank_is_named_and_everybody_gets_an_end(served: Served, victim: int) -> None:
    served.server.wait_ready("llama", timeout=60)
    with ThreadPoolExecutor(1) as pool, served.client() as client:
        whole = pool.submit(client.post, served.url, json=FOREVER)
        with client.stream("POST", served.url, json={**FOREVER, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            began, process = time.monotonic(), served.rank_pid(victim)
            os.kill(process, signal.SIGSTOP)
            *_, last = lines
        assert json.loads(last)["error"]["code"] == 503
        assert "the engine has failed" in whole.result(timeout=10).text
        assert time.monotonic() - began < STEP_TIMEOUT + 5
    assert not psutil.pid_exists(process), "a hung rank would keep its memory"
    wait_until(lambda: not served.server.ready("llama"), seconds=10)
    (last_words,) = re.findall(f"this worker ends: (.* {process}, .*)", served.server.model_log())
    assert f"rank {victim} (process {process}, stopped)" in last_words
    assert first_draw(served)


def test_an_idle_server_is_not_taken_for_a_hung_one(served: Served) -> None:
    first_draw(served)
    ranks = [served.rank_pid(rank) for rank in (0, 1)]
    time.sleep(STEP_TIMEOUT + 2)
    assert [served.rank_pid(rank) for rank in (0, 1)] == ranks


def test_a_killed_worker_takes_its_ranks_along_and_another_takes_its_place(served: Served) -> None:
    first_draw(served)
    ranks = [psutil.Process(served.rank_pid(rank)) for rank in (0, 1)]
    os.kill(ranks[0].ppid(), signal.SIGKILL)
    _, alive = psutil.wait_procs(ranks, timeout=5)
    assert not alive
    wait_until(lambda: not served.server.ready("llama"), seconds=10)
    assert first_draw(served)


def test_a_reply_that_outlives_its_worker_does_not_end_the_next(served: Served) -> None:
    """TorchServe waits for a reply and is held: it wakes to both the reply and the worker's end."""
    first_draw(served)
    (java,) = [process for process in served.server.processes() if process.name() == "java"]
    worker = psutil.Process(psutil.Process(served.rank_pid(0)).ppid())
    with served.client() as client, client.stream("POST", served.url, json={**FOREVER, "stream": True}) as reply:
        next(reply.iter_lines())
        worker.suspend()
        time.sleep(0.2)
        java.suspend()
        worker.resume()
        time.sleep(0.2)
        worker.kill()
        java.resume()
        wait_until(lambda: not served.server.ready("llama"), seconds=5)
    served.server.wait_ready("llama", timeout=60)
    group = [served.rank_pid(rank) for rank in (0, 1)]
    for _ in range(4):
        served.ask(prompt=PROMPT, max_new_tokens=5)
    assert [served.rank_pid(rank) for rank in (0, 1)] == group
