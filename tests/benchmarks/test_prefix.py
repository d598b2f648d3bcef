"""The prefix cache's benchmark: known prefixes come from the cache, and the goal is printed where it applies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.prefix import benchmark
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args


@pytest.mark.parametrize(("prefix_tokens", "cached", "is_wanted"), [(64, 64, False), (1000, 992, True)])
def test_each_prefix_is_sent_twice_and_then_its_full_blocks_are_known(
    prefix_tokens: int, cached: int, is_wanted: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = tiny_args(vocab_size=512)
    checkpoint = write_checkpoint(tmp_path / "converted", args, random_weights(args), tiny_sentencepiece(tmp_path))
    out = tmp_path / "prefix.json"
    benchmark(checkpoint=str(checkpoint), prefix_tokens=prefix_tokens, rounds=2, device="cpu", out=str(out))
    figures = json.loads(out.read_text())["figures"]
    assert figures["cached_tokens"] == [cached, cached]
    ratios = [again / first for again, first in zip(figures["repeated_ttft_ms"], figures["first_ttft_ms"], strict=True)]
    assert (figures["ratio"]["min"], figures["ratio"]["max"]) == (min(ratios), max(ratios))
    assert ("our target: at most 0.2" in capsys.readouterr().out) == is_wanted
