"""The front for coroutines: they share batches, and one that leaves gives its blocks back."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from llama2 import LLM, AsyncLLM, SamplingParams
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

PARAMS = SamplingParams(temperature=0, max_new_tokens=8, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, max_new_tokens=10**6, ignore_eos=True)
PROMPTS = [[5 + index] * 3 for index in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    args = tiny_args(vocab_size=512)
    tokenizer_file = tiny_sentencepiece(folder, vocab_size=512)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer_file)


def make(folder: Path) -> AsyncLLM:
    return AsyncLLM(folder, max_seq_len=512, max_batch_size=4)


async def streamed(llm: AsyncLLM, prompt: list[int]) -> list[int]:
    return [token_id async for piece in llm.stream(prompt, PARAMS) for token_id in piece.token_ids]


async def until_idle(llm: AsyncLLM) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stats = llm._running.stats()
        if (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.total_blocks):
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"blocks are still held: {stats}")


def test_coroutines_get_what_they_would_get_alone_in_fewer_steps(folder: Path) -> None:
    with LLM(folder, max_seq_len=512, max_batch_size=4) as alone:
        expected = [done.token_ids for done in alone.generate(PROMPTS, PARAMS)]

    async def main() -> None:
        async with make(folder) as llm:
            assert await asyncio.gather(*(streamed(llm, prompt) for prompt in PROMPTS)) == expected
            assert llm._running.stats().steps < 0.75 * len(PROMPTS) * 8
            assert [done.token_ids for done in await llm.generate(PROMPTS, PARAMS)] == expected
            (done,) = await llm.generate([PROMPTS[0]], PARAMS, n=2)
            assert [reply.token_ids for reply in done.outputs] == [expected[0]] * 2
            (done,) = await llm.chat([{"role": "user", "content": "Hello"}], PARAMS)
            assert done.finish_reason == "length"

    asyncio.run(main())


def test_to_leave_a_loop_or_to_cancel_it_frees_the_blocks(folder: Path) -> None:
    async def main() -> None:
        async with make(folder) as llm:
            async for _ in llm.stream("Hello", ENDLESS):
                break
            await until_idle(llm)
            task = asyncio.create_task(llm.generate(["Hello", "you"], ENDLESS))
            while llm._running.stats().running < 2:
                await asyncio.sleep(0.001)
            task.cancel()
            await until_idle(llm)

    asyncio.run(main())


def test_a_mistake_is_raised_and_the_others_go_on(folder: Path) -> None:
    async def main() -> None:
        async with make(folder) as llm:
            with pytest.raises(ValueError, match=r"prompts\[.\] must have from 1 to 511 tokens"):
                await llm.generate([[5], [5] * 600])
            with pytest.raises(ValueError, match="did you mean 'temperature'"):
                llm.stream("Hello", temprature=0)
            assert len(await streamed(llm, PROMPTS[0])) == 8

    asyncio.run(main())


def test_after_its_end_every_call_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def waiting(llm: AsyncLLM, end: Coroutine[Any, Any, Any], message: str) -> None:
        task = asyncio.create_task(llm.generate("Hello", ENDLESS))
        while not llm._running.stats().running:
            await asyncio.sleep(0.001)
        await end
        with pytest.raises(RuntimeError, match=message):
            await task
        with pytest.raises(RuntimeError, match=message):
            await llm.generate("Hello")

    async def main() -> None:
        llm = make(folder)
        await waiting(llm, asyncio.to_thread(llm.close), "closed")
        llm = make(folder)

        async def fail() -> None:
            monkeypatch.setattr(llm._running.engine, "step", lambda: 1 / 0)

        await waiting(llm, fail(), "division by zero")
        llm.close()

    asyncio.run(main())


def test_without_a_close_memory_and_threads_end_with_the_object(folder: Path) -> None:
    llm = make(folder)
    asyncio.run(streamed(llm, PROMPTS[0]))
    engine = weakref.ref(llm._running.engine)
    gc.collect()
    gc.disable()
    try:
        del llm
        assert engine() is None
    finally:
        gc.enable()
    assert not {"engine", "deliver"} & {thread.name for thread in threading.enumerate()}


def on_a_rank(folder: Path) -> list[int] | str:
    async def main() -> list[int] | str:
        async with make(folder) as llm:
            if llm.rank == 0:
                return await streamed(llm, PROMPTS[0])
            with pytest.raises(RuntimeError) as caught:
                await llm.generate("Hello")
            return str(caught.value)

    return asyncio.run(main())


@pytest.mark.integration
def test_of_several_ranks_the_first_makes_the_calls(folder: Path) -> None:
    with LLM(folder, max_seq_len=512) as llm:
        (alone,) = llm.generate([PROMPTS[0]], PARAMS)
    ids, refusal = run_ranks(2, on_a_rank, folder)
    assert ids == alone.token_ids
    assert refusal == "rank 0 makes the calls of an AsyncLLM, and this is rank 1: close() waits"
