"""The engine that is measured: what is timed has run before at its full size, and its ids become text."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.engines import MadeUpTokenizer, MeasuredEngine
from benchmarks.peers.protocol import Work
from llama2.engine.sequence import Output, Request


class Recorder:
    """An engine that answers everything with one token a step, and keeps the length of each prompt it was given."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self._left: dict[str, int] = {}

    def add(self, request: Request) -> None:
        self.prompts.append(len(request.prompt_ids))
        self._left[request.request_id] = request.params.max_new_tokens or 1000

    def abort(self, request_id: str) -> None:
        self._left.pop(request_id, None)

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    def step(self) -> list[Output]:
        outputs = [Output(request_id=request_id, token_ids=(1,)) for request_id in self._left]
        self._left = {request_id: left - 1 for request_id, left in self._left.items() if left > 1}
        return outputs


def test_each_size_is_warmed_up_once_and_at_its_full_length() -> None:
    recorder: Any = Recorder()
    engine = MeasuredEngine(recorder)
    for batch, context, prompts in ((1, 40, 3), (1, 40, 2), (1, 90, 3), (2, 40, 6)):
        recorder.prompts.clear()
        done = engine.run(Work(prompts=[[1] * context] * batch, new_tokens=4))
        assert recorder.prompts == [context] * prompts
        assert [len(ids) for ids in done.token_ids] == [5] * batch


@pytest.mark.parametrize("vocab_size", [100, 256, 700])
def test_a_made_up_vocabulary_has_as_many_ids_as_the_model(vocab_size: int) -> None:
    tokenizer = MadeUpTokenizer(vocab_size)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.eos_ids == frozenset(), "a random model must not end by itself"
    ids = [ord("a"), ord("b")] + [vocab_size - 1] * (vocab_size > 256)
    assert tokenizer.decode(ids) == "ab" + (f" {vocab_size - 257}" if vocab_size > 256 else "")
