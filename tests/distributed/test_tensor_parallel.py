"""Every tensor-parallel degree computes the same logits and chooses the same tokens as one rank alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from llama2 import LLM, Completion, SamplingParams
from llama2.engine import loading
from llama2.engine.lockstep import agree
from llama2.engine.runner import Runner
from llama2.parallel.collectives import ProcessGroupCollectives
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.integration

PROMPTS = [list(range(3, 3 + length)) for length in (1, 5, 33, 60)]
# top_p=1: a nucleus ends between two tokens that may be equal up to rounding.
PARAMS = SamplingParams(max_new_tokens=24, temperature=1.0, top_p=1.0, seed=11, logprobs=2)


def use(folder: str, over_gloo: bool = False, kv_cache_dtype: str = "auto") -> tuple[torch.Tensor, list[Completion]]:
    """What a script under torchrun does, the same lines on every rank."""
    if over_gloo:
        loading.connect = lambda device, **_: ProcessGroupCollectives(None)
    llm = LLM(folder, max_seq_len=128, max_batch_size=4, max_step_tokens=32, kv_cache_dtype=kv_cache_dtype)
    return llm.score(PROMPTS[-1]), llm.generate(PROMPTS, PARAMS)


def write(folder: Path, **changes: object) -> Path:
    args = tiny_args(vocab_size=509, **changes)  # a prime: no degree divides it
    tokenizer_file = tiny_sentencepiece(folder, vocab_size=509)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer_file)


@pytest.mark.parametrize(
    ("changes", "degrees"),
    [
        ({"n_kv_heads": 4}, [2, 4]),
        (
            {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
            [2, 3, 6],
        ),  # 6/3 and 2/1 heads; then two ranks share 3 query heads
        ({"n_heads": 8, "n_kv_heads": 8}, [3]),  # 3, 3 and 2 heads
        ({"n_heads": 8, "n_kv_heads": 2}, [8]),  # each KV head on 4 ranks
    ],
)
def test_every_degree_agrees_with_one_rank(tmp_path: Path, changes: dict[str, object], degrees: list[int]) -> None:
    folder = write(tmp_path, **changes)
    logits, replies = use(str(folder))
    for degree in degrees:
        for rank, (theirs, completions) in enumerate(run_ranks(degree, use, str(folder))):
            torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=0, msg=f"TP={degree}, rank {rank}")
            assert [one.token_ids for one in completions] == [one.token_ids for one in replies]
            assert [one.text for one in completions] == [one.text for one in replies]


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_a_kv_cache_of_codes_agrees_but_for_a_few_codes(tmp_path: Path, kept: str) -> None:
    """A sum over ranks has other last digits, of which some make a neighbouring code."""
    folder = write(tmp_path)
    exact, _ = use(str(folder))
    logits, _ = use(str(folder), False, kept)
    for theirs, _ in run_ranks(2, use, str(folder), False, kept):
        assert 5 * (theirs - logits).norm() < (logits - exact).norm()


def test_gloo_and_shared_memory_agree(tmp_path: Path) -> None:
    """The process-group transport, which NCCL takes too, gives what the shared memory of one host gives."""
    folder = write(tmp_path)
    logits, replies = use(str(folder))
    for theirs, completions in run_ranks(2, use, str(folder), True):
        torch.testing.assert_close(theirs, logits, atol=1e-5, rtol=0)
        assert [one.token_ids for one in completions] == [one.token_ids for one in replies]


def miss_a_step(folder: str) -> None:
    llm = LLM(folder, max_seq_len=64)
    if dist.get_rank() == 1:
        llm._engine._group.steps = 7
    llm.score([5, 6, 7])


def test_a_rank_that_missed_a_step_ends_the_group_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 1 is out of step: it ran step 7 last, and rank 0 sends step 1"):
        run_ranks(2, miss_a_step, str(write(tmp_path)))


def note(runner: Runner, text: str) -> str:
    """Stands for a method of the runner that runs no plan."""
    raise NotImplementedError


def do_something_else_between_steps(folder: str) -> list[str]:
    llm, noted = LLM(folder, max_seq_len=64), list[str]()
    group = llm._engine._group
    group._runner.note = lambda text: noted.append(f"{text} on {group.rank} at {group.steps}")  # type: ignore[attr-defined]
    llm.score([5, 6, 7])
    if group.rank == 0:
        group.call(note, "done")
    llm.score([5, 6, 7])
    return noted


def test_whatever_all_ranks_must_do_is_a_call_like_that_of_a_plan(tmp_path: Path) -> None:
    replies = run_ranks(2, do_something_else_between_steps, str(write(tmp_path)))
    assert replies == [["done on 0 at 2"], ["done on 1 at 2"]]


def start_differently(folder: str) -> None:
    LLM(folder, max_seq_len=64 + dist.get_rank())


def test_ranks_with_different_settings_do_not_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 was started with .*max_seq_len=65"):
        run_ranks(2, start_differently, str(write(tmp_path)))


def lack_memory_on_rank_1() -> str:
    def count() -> int:
        if dist.get_rank() == 1:
            raise ValueError("1 block is too little")
        return 100

    with pytest.raises(ValueError) as caught:
        agree("settings", count)
    return str(caught.value)


def test_a_rank_without_room_ends_the_start_on_all_ranks() -> None:
    assert run_ranks(3, lack_memory_on_rank_1) == ["rank 1: 1 block is too little"] * 3


def test_a_degree_that_the_model_cannot_take_is_refused_with_those_it_can(tmp_path: Path) -> None:
    folder = write(tmp_path, n_kv_heads=4)
    with pytest.raises(RuntimeError, match=r"ValueError: .*4 KV heads cannot run .*degree 3; it can at 1, 2, 4, 8"):
        run_ranks(3, use, str(folder))
