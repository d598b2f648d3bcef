"""What a run takes does not depend on the runs before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evaluation import runs
from evaluation.config import read_settings
from evaluation.inputs import Inputs
from llama2 import LLM
from tests.evaluation.support import write_config
from tests.handler.support import byte_tokenizer
from tests.support.checkpoints import write_checkpoint
from tests.support.weights import random_weights, tiny_args


def test_a_run_finds_no_prompts_of_earlier_ones_in_the_prefix_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []  # prompts, and how many of their tokens came from the prefix cache

    class Counted(LLM):
        def generate(self, prompts: Any, *arguments: Any, **options: Any) -> Any:
            before = self._engine.stats().cached_tokens
            completions = super().generate(prompts, *arguments, **options)
            calls.append((len(prompts), self._engine.stats().cached_tokens - before))
            return completions

    monkeypatch.setattr(runs, "LLM", Counted)
    args = tiny_args(vocab_size=260)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", args, random_weights(args))
    byte_tokenizer(checkpoint)
    few_shot = [{"name": name, "shots": 3} for name in "abc"]
    engine = {"max_batch_size": 1, "max_seq_len": 512}
    settings = read_settings(write_config(tmp_path, checkpoint, runs=few_shot, engine=engine))
    assert len(list(runs.run_all(settings, settings.runs, Inputs.read(settings)))) == 3
    assert [count for count, _ in calls] == [1, 3] * 3
    counted = [cached for count, cached in calls if count == 3]
    # The examples, which all samples of a run have before them, come from that run's first one.
    assert counted[0] > 0
    assert counted == counted[:1] * 3
