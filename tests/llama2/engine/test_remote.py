"""An engine whose ranks are other processes says what one in this process says, and how it fails."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama2.config import EngineConfig, ModelArgs
from llama2.engine.loading import load_engine
from llama2.engine.messages import Settings
from llama2.engine.remote import RemoteEngine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Output, Request
from llama2.errors import EngineFailure, InvalidValue
from llama2.text.grammar import GrammarCompiler
from llama2.text.tokenizer import load_tokenizer
from tests.llama2.engine.test_engine import GREEDY, request, run

pytestmark = pytest.mark.integration

CONFIG = EngineConfig(max_seq_len=96, max_batch_size=4, seed=3)


def start(folder: Path, *, degree: int = 1, config: EngineConfig = CONFIG, step_timeout: float = 30) -> RemoteEngine:
    settings = Settings(checkpoint_dir=folder, device="cpu", dtype="float32", config=config)
    return RemoteEngine(settings, degree=degree, threads=1, step_timeout=step_timeout)


@pytest.fixture(scope="module")
def remote(folder: Path) -> Iterator[RemoteEngine]:
    engine = start(folder, degree=2)
    engine.wait_until_ready()
    yield engine
    processes = engine._ranks.processes
    engine.close()
    assert [process.returncode for process in processes] == [0, 0], "they end by themselves"


def outputs_of(engine: RemoteEngine, *requests: Request) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {one.request_id: [] for one in requests}
    for one in requests:
        engine.add(one)
    left, deadline = sum(one.params.n for one in requests), time.monotonic() + 30
    while left:
        assert time.monotonic() < deadline
        for output in engine.poll(1.0):
            outputs[output.request_id].append(output)
            left -= output.finish_reason is not None
    return outputs


def text_of(outputs: list[Output]) -> str:
    return "".join(output.text for output in outputs)


def test_its_replies_are_those_of_an_engine_in_this_process(remote: RemoteEngine, folder: Path) -> None:
    text, ids, reason = run(load_engine(folder, config=CONFIG), GREEDY)
    outputs = outputs_of(remote, request("a"), request("b"))
    for name in "ab":
        assert text_of(outputs[name]) == text
        assert [token_id for output in outputs[name] for token_id in output.token_ids] == ids
        assert outputs[name][-1].finish_reason == reason


def test_a_grammar_goes_along(remote: RemoteEngine, folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    grammar = GrammarCompiler(tokenizer, ModelArgs.load(folder).vocab_size).regex("[ab]{6}")
    params = SamplingParams(max_new_tokens=20, seed=1, n=2)
    asked = Request(request_id="g", prompt_ids=(5, 6), params=params, grammar=grammar)
    outputs = outputs_of(remote, asked)["g"]
    for index in (0, 1):
        text = text_of([output for output in outputs if output.index == index])
        assert len(text.strip()) == 6
        assert set(text.strip()) <= set("ab")


def test_what_can_never_run_is_refused_at_once(remote: RemoteEngine) -> None:
    with pytest.raises(InvalidValue, match="prompt_ids must have from 1 to 95 tokens, got 100"):
        remote.add(request("long", prompt=(1,) * 100))
    assert remote.stats().waiting == 0


def test_an_abort_frees_every_block(remote: RemoteEngine) -> None:
    remote.add(request("a", SamplingParams(max_new_tokens=None, ignore_eos=True)))
    while not remote.poll(1.0):
        pass
    remote.abort("a")
    remote.abort("nobody")
    ended = [output for output in remote.poll(1.0) if output.finish_reason]
    assert ended or [output for output in remote.poll(5.0) if output.finish_reason]
    deadline = time.monotonic() + 5
    while (stats := remote.stats()).free_blocks != stats.total_blocks or stats.waiting or stats.running:
        assert time.monotonic() < deadline, stats
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("degree", "wrong", "message"),
    [
        (3, "", "cannot run at tensor-parallel degree 3"),
        (2, "model_args.json", "model_args.json"),
    ],
)
def test_what_keeps_a_rank_from_loading_is_told(
    folder: Path, tmp_path: Path, degree: int, wrong: str, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    if wrong:
        (tmp_path / "copy" / wrong).write_text("{")
    engine = start(tmp_path / "copy", degree=degree)
    with pytest.raises(EngineFailure, match=message):
        engine.wait_until_ready()
    assert all(process.returncode is not None for process in engine._ranks.processes)
    engine.close()


def test_a_rank_that_dies_while_it_loads_is_told(folder: Path) -> None:
    engine = start(folder, degree=2)
    os.kill(engine._ranks.processes[1].pid, signal.SIGKILL)
    with pytest.raises(EngineFailure, match="rank 1 was killed by SIGKILL"):
        engine.wait_until_ready()
    engine.close()


@pytest.mark.parametrize(
    ("degree", "victim", "how", "message"),
    [
        (2, 1, signal.SIGKILL, "rank 1 was killed by SIGKILL"),
        (2, 1, signal.SIGSTOP, r"everybody waits for rank 1 \(process \d+, stopped\)"),
        (2, 0, signal.SIGSTOP, r"everybody waits for rank 0 \(process \d+, stopped\)"),
        (1, 0, signal.SIGSTOP, r"everybody waits for rank 0 \(process \d+, stopped\)"),
    ],
)
def test_an_engine_that_has_failed_says_so_to_whoever_asks(
    folder: Path, degree: int, victim: int, how: signal.Signals, message: str
) -> None:
    engine = start(folder, degree=degree, config=EngineConfig(max_seq_len=4000, max_batch_size=4), step_timeout=1)
    engine.wait_until_ready()
    failures: queue.Queue[EngineFailure] = queue.Queue()
    engine.on_failure(failures.put)
    engine.add(request("a", SamplingParams(max_new_tokens=None, ignore_eos=True)))
    while not engine.poll(1.0):
        pass
    os.kill(engine._ranks.processes[victim].pid, how)
    assert re.search(message, str(failures.get(timeout=10)))
    with pytest.raises(EngineFailure):
        engine.add(request("b"))
    engine.abort("a")
    engine.suspend()
    assert all(process.returncode is not None for process in engine._ranks.processes)
    engine.close()
