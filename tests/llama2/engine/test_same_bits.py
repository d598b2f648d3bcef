"""A reply's bits depend on its own tokens alone: not on its company, its cuts, the prefix cache or a preemption, with
every `kv_cache_dtype`.

Log-probabilities are compared beside the ids, since two ids may be equal by chance. This holds in bf16, whose products
are our own. Where weights are not packed, these take up to `MAX_STREAMED_ROWS` rows; oneDNN's take more and sum in
another order, so steps stay below that here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.config import KV_CACHE_DTYPES
from llama2.engine import loading
from llama2.kernels.cpu import library
from tests.support.adapters import write_random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

MAX_STREAMED_ROWS = 64  # streamed_linear.cpp
# SmolLM2's heads, three for a key head, and contexts on both sides of where attention cuts them (256).
ARGS = tiny_args(dim=192, n_layers=3, n_heads=3, n_kv_heads=1, hidden_dim=512, vocab_size=1024)
GREEDY = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True, logprobs=5)
START = list(range(3, 203))
PROMPTS = [
    START[:first] + torch.randint(3, 1024, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for first, length in [(0, 5), (0, 13), (0, 64), (0, 111), (200, 1), (200, 20), (200, 50), (0, 256), (200, 130)]
]


@dataclass(frozen=True, slots=True)
class Model:
    """Makes engines of one checkpoint, in whose steps one product does all rows."""

    folder: Path
    max_step_tokens: int
    kv_cache_dtype: str

    def engine(self, **changes: Any) -> LLM:
        settings = {"max_seq_len": 512, "max_batch_size": 9, "prefix_cache": False, "max_step_tokens": 512, **changes}
        settings["max_step_tokens"] = min(settings["max_step_tokens"], self.max_step_tokens)
        return LLM(self.folder, dtype=torch.bfloat16, device="cpu", kv_cache_dtype=self.kv_cache_dtype, **settings)


@pytest.fixture(scope="module", params=KV_CACHE_DTYPES)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Model:
    assert library.load_library(), "the test needs a C++ compiler"
    folder = tmp_path_factory.mktemp("same-bits")
    write_checkpoint(folder / "model", ARGS, random_weights(ARGS), tiny_sentencepiece(folder, vocab_size=1024))
    rows = 512 if torch.ops.llama2_cpu.packs_weights() else MAX_STREAMED_ROWS
    return Model(folder / "model", rows, request.param)


@pytest.fixture(scope="module")
def alone(model: Model) -> list[Any]:
    """The reply to each prompt on its own."""
    llm = model.engine()
    return [llm.generate([prompt], GREEDY)[0] for prompt in PROMPTS]


def test_the_replies_are_worth_comparing(alone: list[Any]) -> None:
    assert len({tuple(reply.token_ids) for reply in alone}) == len(PROMPTS)
    assert all(len(set(reply.token_ids)) > 10 and len(reply.logprobs) == 40 for reply in alone)


@pytest.mark.parametrize("max_step_tokens", [512, 64, 23])
def test_in_a_batch_of_nine_and_in_pieces_of_any_size(model: Model, alone: list[Any], max_step_tokens: int) -> None:
    assert model.engine(max_step_tokens=max_step_tokens).generate(PROMPTS, GREEDY) == alone


def test_from_a_cold_and_from_a_warm_prefix_cache(model: Model, alone: list[Any]) -> None:
    llm = model.engine(prefix_cache=True)
    for _ in range(2):
        assert llm.generate(PROMPTS, GREEDY) == alone
    assert llm._engine.stats().cached_tokens > 1000


def test_by_one_thread_and_by_three(model: Model, alone: list[Any]) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert model.engine().generate(PROMPTS, GREEDY) == alone
    finally:
        torch.set_num_threads(before)


def test_after_a_preemption(
    model: Model, alone: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "count_blocks", lambda *args, **kwargs: 40)  # of 99 that all nine take
    llm = model.engine()
    with caplog.at_level("DEBUG", logger="llama2.engine.scheduler"):
        assert llm.generate(PROMPTS, GREEDY) == alone
    assert "preempted" in caplog.text


def test_after_all_were_preempted_again_and_again(
    model: Model, alone: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does that is suspended."""
    engine = (llm := model.engine(prefix_cache=True))._engine
    step, calls = engine.step, count(1)
    monkeypatch.setattr(engine, "step", lambda: step() if next(calls) % 11 else engine.preempt_all())
    assert llm.generate(PROMPTS, GREEDY) == alone
    assert next(calls) > 44


def test_sixteen_adapters_and_the_base_in_a_batch(model: Model, alone: list[Any], tmp_path: Path) -> None:
    """With a slot for each adapter, and with three for all; each adds what it adds in fp32, up to rounding."""
    folders = [write_random_adapter(tmp_path / str(seed), ARGS, seed, r=3 + seed % 12, size=0.3) for seed in range(16)]
    prompts, asked = [*PROMPTS, *PROMPTS[:8]], [*folders[4:], None, *folders[:4]]
    llm = model.engine(max_loras=16, max_batch_size=17)
    by_itself = [
        llm.generate([prompt], GREEDY, adapter=adapter)[0] for prompt, adapter in zip(prompts, asked, strict=True)
    ]
    assert llm.generate(prompts, GREEDY, adapter=asked) == by_itself
    few_slots = model.engine(max_loras=3, max_batch_size=17, max_step_tokens=23)
    assert few_slots.generate(prompts, GREEDY, adapter=asked) == by_itself
    same = [reply == plain for reply, plain in zip(by_itself, [*alone, *alone[:8]], strict=True)]
    assert same == [one is None for one in asked]
    exact = LLM(model.folder, dtype=torch.float32, device="cpu", max_seq_len=512, max_loras=3)
    base = exact.score(PROMPTS[3])
    for folder in folders[::5]:
        expected, ours = (one.score(PROMPTS[3], adapter=folder) for one in (exact, llm))
        assert (ours - expected).abs().mean() < 0.1 * (base - expected).abs().mean()
