"""A recorded pass computes what the same pass computes when it is launched anew, on any device.

A CPU records nothing: there a "recording" is the procedure itself, which works on the same fixed tensors.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.batch import Batch
from llama2.config import EngineConfig, ModelArgs
from llama2.engine import runner as runner_module
from llama2.engine.graphs import Recording, batch_sizes, token_sizes
from llama2.engine.inputs import Inputs, Sizes
from llama2.engine.scheduler import Chunk, Logits, Plan
from llama2.engine.token_pool import TokenPool
from llama2.kv_cache import KVCache
from llama2.parallel.collectives import SingleRank
from tests.support.adapters import write_random_adapter
from tests.support.ranks import run_ranks
from tests.support.weights import tiny_args

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0, max_new_tokens=25, ignore_eos=True)


@dataclass
class Recorder:
    """Notes replays by size; `sizes` are those of what it is given, in this order."""

    sizes: list[str]
    replayed: list[str] = field(default_factory=list)
    reset: list[str] = field(default_factory=list)
    _count: int = 0

    def __call__(self, procedure: Callable[[], None]) -> Recording:
        size = self.sizes[self._count]
        self._count += 1
        procedure()
        return Recorded(self, size, procedure)


@dataclass
class Recorded:
    recorder: Recorder
    size: str
    procedure: Callable[[], None]

    def replay(self) -> None:
        self.recorder.replayed.append(self.size)
        self.procedure()

    def reset(self) -> None:
        self.recorder.reset.append(self.size)


def recorder_of(max_batch_size: int, max_step_tokens: int = 512) -> Recorder:
    """Of passes that decode so many sequences, "3", or hold so many "tokens: 64"; largest first."""
    sizes = [(size, f"{size}") for size in batch_sizes(max_batch_size)]
    largest = EngineConfig(max_batch_size=max_batch_size, max_step_tokens=max_step_tokens).recorded_tokens
    sizes += [(size, f"tokens: {size}") for size in token_sizes(largest)]
    return Recorder([name for _, name in sorted(sizes, reverse=True)])


def recorded(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[LLM, Recorder]:
    recorder = recorder_of(settings["max_batch_size"], settings.get("max_step_tokens", 512))
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
    assert batch_sizes(largest) == sizes


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [
        (1, (1,)),
        (32, (32,)),
        (100, (32, 64, 100)),
        (512, (32, 64, 128, 256, 384, 512)),
        (2048, (32, 64, 128, 256, 384, 512)),
    ],
)
def test_passes_with_prompts_are_recorded_as_far_as_it_pays(largest: int, sizes: tuple[int, ...]) -> None:
    assert token_sizes(EngineConfig(max_batch_size=1, max_step_tokens=largest).recorded_tokens) == sizes


def test_replies_are_the_same_recorded_and_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even while prompts come in between, batches shrink, and rows are drawn from a distribution."""
    settings: dict[str, Any] = {"max_seq_len": 128, "max_batch_size": 6, "max_step_tokens": 40}
    llm, recorder = recorded(folder, monkeypatch, **settings)
    plain = LLM(folder, **settings)
    prompts = [prompt(length) for length in (1, 3, 16, 17, 40, 70, 5, 9)]
    params = [
        replace(GREEDY, max_new_tokens=5 + 3 * index, temperature=index % 2, top_p=1.0, seed=index)
        for index in range(len(prompts))
    ]
    assert llm.generate(prompts, params) == plain.generate(prompts, params)
    assert set(recorder.replayed) == set(recorder.sizes), "every size was used"


def test_recorded_passes_take_any_mix_of_adapters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set of recordings: adapters change places in the slots, and some passes have none."""
    settings: dict[str, Any] = {"max_seq_len": 128, "max_batch_size": 6, "max_step_tokens": 40, "max_loras": 2}
    args = ModelArgs.load(folder)
    adapters = [write_random_adapter(tmp_path / str(seed), args, seed) for seed in range(3)]
    llm, recorder = recorded(folder, monkeypatch, **settings)
    plain = LLM(folder, **settings)
    prompts = [prompt(length) for length in (1, 3, 16, 40, 70, 5)]
    asked = [adapters[0], None, adapters[1], adapters[2], adapters[0], None]
    params = [replace(GREEDY, max_new_tokens=5 + 3 * index) for index in range(len(prompts))]
    replies = llm.generate(prompts, params, adapter=asked)
    assert replies == plain.generate(prompts, params, adapter=asked)
    assert set(recorder.replayed) & {"1", "2"}
    assert llm.generate(prompts, params) == plain.generate(prompts, params) != replies


def test_the_smallest_bucket_that_holds_the_batch_is_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=9)
    for count, size in ((1, "1"), (2, "2"), (3, "4"), (5, "8"), (8, "8"), (9, "9")):
        recorder.replayed.clear()
        llm.generate([prompt(8)] * count, replace(GREEDY, max_new_tokens=3))
        tokens = "tokens: 32" if count * 8 <= 32 else "tokens: 64" if count * 8 <= 64 else "tokens: 128"
        assert recorder.replayed == [tokens, size, size], count


def test_what_is_kept_beyond_the_step_is_not_replayed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay overwrites the logits; a scored prompt keeps its own for as long as it is read."""
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=1, max_step_tokens=1)
    expected = LLM(folder, max_seq_len=64, max_batch_size=1).score(prompt(12))
    torch.testing.assert_close(llm.score(prompt(12)), expected, atol=1e-5, rtol=0)
    assert not recorder.replayed


def test_a_row_whose_logits_nobody_wants_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the end of a prompt that is cut into single tokens."""
    settings: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 4}
    llm, recorder = recorded(folder, monkeypatch, **settings)
    wanted: tuple[Logits, ...] = ("last", "none", "last")
    chunks = tuple(Chunk(key, 0, (7 + key,), array("i", [key]), logits) for key, logits in enumerate(wanted))
    ours, theirs = (one._engine._group._runner.run(Plan(chunks=chunks)) for one in (llm, LLM(folder, **settings)))
    assert recorder.replayed
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_rows_that_fill_a_bucket_touch_no_block_of_a_sequence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=8)
    runner = llm._engine._group._runner
    cache = runner._cache
    for layer in (*cache.keys, *cache.values):
        layer.fill_(1)
    chunks = tuple(Chunk(key, 16, (7,), array("i", [key, 3 + key]), "last") for key in range(3))
    runner.run(Plan(chunks=chunks))
    assert recorder.replayed == ["4"]
    for layer in (*cache.keys, *cache.values):
        written = (layer != 1).flatten(2).any(-1).nonzero().tolist()
        assert written == [[3, 0], [4, 0], [5, 0], [cache.scratch_block, 0]]


def reply_on_a_rank(folder: str) -> tuple[list[list[int]], list[str], list[str]]:
    recorder = recorder_of(3)
    runner_module.choose_record = lambda device: recorder
    llm = LLM(folder, max_seq_len=64, max_batch_size=3)
    replies = llm.generate([prompt(length) for length in (1, 9, 20)], GREEDY)
    llm.close()
    return [reply.token_ids for reply in replies], recorder.replayed, recorder.reset


@pytest.mark.integration
def test_two_ranks_replay_the_same_and_reply_as_one_does(folder: Path) -> None:
    expected = LLM(folder, max_seq_len=64, max_batch_size=3).generate([prompt(length) for length in (1, 9, 20)], GREEDY)
    (leads, led_by, given_up), (follows, followed, _) = run_ranks(2, reply_on_a_rank, str(folder))
    assert leads == follows == [reply.token_ids for reply in expected]
    assert led_by == followed != []
    assert given_up, "and both close"


def test_a_plan_is_recorded_unless_it_is_large_or_its_logits_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, _ = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=2, max_step_tokens=40)
    graphs = llm._engine._group._runner._graphs
    assert graphs is not None
    single = Chunk(0, 5, (1,), array("i", [0]), "last")
    piece = Chunk(1, 0, (1, 2), array("i", [1]), "last")
    assert graphs.takes(Plan(chunks=(single, single._replace(logits="none"))))
    assert graphs.takes(Plan(chunks=(single, piece._replace(token_ids=(1,) * 39))))
    assert not graphs.takes(Plan(chunks=(single, piece._replace(token_ids=(1,) * 40))))
    assert not graphs.takes(Plan(chunks=(single, piece._replace(logits="all"))))
    assert not graphs.takes(Plan(chunks=(single._replace(logits="all"),)))


def test_what_was_recorded_is_given_up_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the engine is closed, or at the latest when the process ends: the process group goes after it."""
    llm, recorder = recorded(folder, monkeypatch, max_seq_len=64, max_batch_size=2)
    graphs = llm._engine._group._runner._graphs
    assert graphs is not None
    assert graphs.close.atexit
    assert not recorder.reset
    llm._engine.close()
    graphs.close()
    assert sorted(recorder.reset) == sorted(recorder.sizes)


@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_a_first_pass_is_as_large_as_passes_become(
    folder: Path, monkeypatch: pytest.MonkeyPatch, max_batch_size: int
) -> None:
    config = EngineConfig(max_seq_len=20, max_batch_size=max_batch_size, max_step_tokens=30)
    llm = LLM(folder, max_seq_len=20, max_batch_size=max_batch_size, max_step_tokens=30)
    passes: list[list[int]] = []
    model = llm._engine._group._runner._model

    def run(tokens_T: torch.Tensor, batch: Batch, rows_R: torch.Tensor) -> None:
        passes.append(batch.query_starts_S1.diff().tolist())

    monkeypatch.setattr(type(model), "__call__", lambda self, *inputs: run(*inputs))
    llm._engine._group._runner.warm_up(config)
    assert passes == [{1: [20], 3: [1, 20, 9]}[max_batch_size]]


def small_cache(*, block_size: int) -> KVCache:
    """Of nine blocks; the tenth is the scratch block."""
    args = tiny_args()
    return KVCache(args, num_blocks=9, block_size=block_size, n_kv_heads=1, dtype=torch.float32, device=CPU)


def test_inputs_lie_where_the_plan_says() -> None:
    sizes = Sizes(tokens=6, sequences=3, rows=2, blocks=3)
    inputs = Inputs(sizes, CPU)
    chunks = [
        Chunk(0, 4, (), array("i", [7, 8]), "last", unread=(1,)),
        Chunk(1, 0, (11, 12), array("i", [5]), "none"),
        Chunk(2, 7, (13, 14, 15), array("i", [1, 2, 3]), "last"),
    ]
    inputs.fill(chunks, [0, 5], small_cache(block_size=4))
    copied = Inputs(sizes, CPU).copy_(inputs)
    assert copied.ids_T.tolist() == [0, 11, 12, 13, 14, 15]
    assert copied.sources_T.tolist() == [6 + 1, 1, 2, 3, 4, 5]
    pool = TokenPool(2, SingleRank(), CPU)
    pool.put([1, 0], torch.tensor([10, -1]))
    assert pool.gather(copied).tolist() == [10, 11, 12, 13, 14, 15]
    assert copied.positions_T.tolist() == [4, 0, 1, 7, 8, 9]
    assert copied.slot_mapping_T.tolist() == [32, 20, 21, 11, 12, 13]
    assert copied.rows_R.tolist() == [0, 5]
    assert copied.query_starts_S1.tolist() == [0, 1, 3, 6]
    assert copied.seq_lens_S.tolist() == [5, 2, 10]
    assert copied.block_tables_SN.tolist() == [[7, 8, 0], [5, 0, 0], [1, 2, 3]]
    roomy = Inputs(Sizes(tokens=8, sequences=5, rows=3, blocks=4), CPU)
    roomy.fill(chunks, [0, 5], small_cache(block_size=4))
    assert roomy.ids_T.tolist() == [0, 11, 12, 13, 14, 15, 0, 0]
    assert pool.gather(roomy).tolist() == [10, 11, 12, 13, 14, 15, 0, 0], "padding has an id that exists"
    assert roomy.slot_mapping_T.tolist() == [32, 20, 21, 11, 12, 13, 36, 36], "padding goes to the scratch block"
    assert roomy.query_starts_S1.tolist() == [0, 1, 3, 6, 6, 6]
    assert roomy.seq_lens_S.tolist() == [5, 2, 10, 0, 0]
    dtypes = {
        name: getattr(copied, name).dtype for name in ("ids_T", "slot_mapping_T", "seq_lens_S", "block_tables_SN")
    }
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
