"""Decoding from recordings computes what decoding step by step computes, on any device.

A CPU records nothing: there a "recording" is the procedure itself, which works on the same fixed tensors.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.config import EngineConfig
from llama2.engine import runner as runner_module
from llama2.engine.graphs import DecodeGraphs, bucket_sizes
from llama2.engine.inputs import Inputs, Sizes
from llama2.engine.scheduler import Chunk, Logits, Plan
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_new_tokens=25, ignore_eos=True)


class Recorder:
    """Keeps what it was given, and counts the replays of each."""

    def __init__(self) -> None:
        self.replayed: list[int] = []
        self._count = 0

    def __call__(self, procedure: Callable[[], None]) -> Callable[[], None]:
        index = self._count
        self._count += 1
        procedure()

        def replay() -> None:
            self.replayed.append(index)
            procedure()

        return replay


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    args = tiny_args(vocab_size=512, n_kv_heads=2)
    tokenizer = tiny_sentencepiece(folder, vocab_size=512)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer)


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[LLM, Recorder]:
    recorder = Recorder()
    monkeypatch.setattr(runner_module, "choose_record", lambda device: recorder)
    llm = LLM(folder, **settings)
    monkeypatch.undo()
    return llm, recorder


def prompt(length: int) -> list[int]:
    return torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (6, (1, 2, 4, 6)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
        (24, (1, 2, 4, 8, 16, 24)),
    ],
)
def test_buckets_grow_to_the_largest_batch_and_no_further(largest: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(largest) == sizes


def test_replies_are_the_same_recorded_and_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while prompts come in between, batches shrink, and rows are drawn from a distribution."""
    settings: dict[str, Any] = {"max_seq_len": 128, "max_batch_size": 6, "max_step_tokens": 32}
    llm, recorder = recorded(folder, monkeypatch, **settings)
    plain = LLM(folder, **settings)
    prompts = [prompt(length) for length in (1, 3, 16, 17, 40, 70, 5, 9)]
    params = [
        replace(GREEDY, max_new_tokens=5 + 3 * index, temperature=index % 2, top_p=1.0, seed=index)
        for index in range(len(prompts))
    ]
    assert llm.generate(prompts, params) == plain.generate(prompts, params)
    assert set(recorder.replayed) == {0, 1, 2, 3}, "every bucket was used"


def test_the_smallest_bucket_that_holds_the_batch_is_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=9)
    for count, index in ((1, 4), (2, 3), (3, 2), (5, 1), (8, 1), (9, 0)):  # recorded largest first: 9, 8, 4, 2, 1
        recorder.replayed.clear()
        llm.generate([prompt(4)] * count, replace(GREEDY, max_new_tokens=3))
        assert set(recorder.replayed) == {index}, count


def test_what_is_kept_beyond_the_step_is_not_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay overwrites the logits; a scored prompt keeps its own for as long as it is read."""
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=1, max_step_tokens=1)
    expected = LLM(folder, max_seq_len=64, max_batch_size=1).score(prompt(12))
    torch.testing.assert_close(llm.score(prompt(12)), expected, atol=1e-5, rtol=0)
    assert not recorder.replayed


def test_a_row_whose_logits_nobody_wants_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a prompt that is cut into single tokens, before its end."""
    settings: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4}
    llm, recorder = recorded(folder, monkeypatch, **settings)
    wanted: tuple[Logits, ...] = ("last", "none", "last")
    chunks = tuple(Chunk(key, 0, (7 + key,), array("i", [key]), logits) for key, logits in enumerate(wanted))
    ours, theirs = (
        one._engine._group._runner.run(Plan(step=1, chunks=chunks)) for one in (llm, LLM(folder, **settings))
    )
    assert recorder.replayed
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_rows_that_fill_a_bucket_touch_no_block_of_a_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=8)
    runner = llm._engine._group._runner
    cache = runner._cache
    for layer in (*cache.keys, *cache.values):
        layer.fill_(1)
    chunks = tuple(Chunk(key, 16, (7,), array("i", [key, 3 + key]), "last") for key in range(3))
    runner.run(Plan(step=1, chunks=chunks))
    assert recorder.replayed == [1]  # 8, 4, …
    for layer in (*cache.keys, *cache.values):
        written = (layer != 1).flatten(2).any(-1).nonzero().tolist()
        assert written == [[3, 0], [4, 0], [5, 0], [cache.scratch_block, 0]]


def reply_on_a_rank(folder: str) -> tuple[list[list[int]], list[int]]:
    recorder = Recorder()
    runner_module.choose_record = lambda device: recorder
    replies = LLM(folder, max_seq_len=64, max_batch_size=3).generate([prompt(length) for length in (1, 9, 20)], GREEDY)
    return [reply.token_ids for reply in replies], recorder.replayed


def test_two_ranks_replay_the_same_and_reply_as_one_does(folder: Path) -> None:
    expected = LLM(folder, max_seq_len=64, max_batch_size=3).generate([prompt(length) for length in (1, 9, 20)], GREEDY)
    (leads, led_by), (follows, followed) = run_ranks(2, reply_on_a_rank, str(folder))
    assert leads == follows == [reply.token_ids for reply in expected]
    assert led_by == followed != []


def test_a_mixed_plan_runs_step_by_step() -> None:
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    single = Chunk(0, 5, (1,), array("i", [0]), "last")
    assert graphs.takes(Plan(step=1, chunks=(single, single._replace(logits="none"))))
    assert not graphs.takes(Plan(step=1, chunks=(single, Chunk(1, 0, (1, 2), array("i", [1]), "last"))))
    assert not graphs.takes(Plan(step=1, chunks=(single._replace(logits="all"),)))


def test_inputs_lie_where_the_plan_says() -> None:
    sizes = Sizes(tokens=6, sequences=3, rows=2, blocks=3)
    inputs = Inputs(sizes, CPU)
    chunks = [
        Chunk(0, 4, (10,), array("i", [7, 8]), "last"),
        Chunk(1, 0, (11, 12), array("i", [5]), "none"),
        Chunk(2, 7, (13, 14, 15), array("i", [1, 2, 3]), "last"),
    ]
    inputs.fill(chunks, [0, 5], 4)
    copied = Inputs(sizes, CPU).copy_(inputs)
    assert copied.tokens_T.tolist() == [10, 11, 12, 13, 14, 15]
    assert copied.positions_T.tolist() == [4, 0, 1, 7, 8, 9]
    assert copied.slots_T.tolist() == [32, 20, 21, 11, 12, 13]
    assert copied.rows_R.tolist() == [0, 5]
    assert copied.query_starts_S1.tolist() == [0, 1, 3, 6]
    assert copied.contexts_S.tolist() == [5, 2, 10]
    assert copied.tables_SN.tolist() == [[7, 8, 0], [5, 0, 0], [1, 2, 3]]
    dtypes = {name: getattr(copied, name).dtype for name in ("tokens_T", "slots_T", "contexts_S", "tables_SN")}
    assert list(dtypes.values()) == [torch.int64, torch.int64, torch.int32, torch.int32]


@pytest.mark.gpu
def test_a_gpu_replies_the_same_with_graphs_and_without(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [prompt(length) for length in (1, 3, 16, 17, 40, 70, 5, 9)]
    params = [replace(GREEDY, max_new_tokens=5 + 3 * index) for index in range(len(prompts))]
    with caplog.at_level(logging.INFO):
        replies = [
            LLM(
                folder, dtype=torch.float32, max_seq_len=128, max_batch_size=6, device=device, cuda_graphs=graphs
            ).generate(prompts, params)
            for device, graphs in (("cuda", True), ("cuda", False), ("cpu", False))
        ]
    assert replies[0] == replies[1]
    assert replies[1] == replies[2]


def test_settings_that_are_no_booleans_are_refused() -> None:
    with pytest.raises(ValueError, match="cuda_graphs must be true or false, got 1"):
        EngineConfig(cuda_graphs=1)  # type: ignore[arg-type]
