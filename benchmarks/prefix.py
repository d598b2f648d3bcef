"""Measures what the prefix cache saves: time to first token of a prompt that begins like an earlier one.

    python -m benchmarks.prefix [--checkpoint build/converted_checkpoints] [--prefix_tokens 1000] [--rounds 5]

In each round a new prefix is sent twice, with a different end each time, and no other request running. The same
command runs under torchrun. Target: with `WANTED_PREFIX` tokens in common the second time takes at most `WANTED_RATIO`
of the first.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

from benchmarks.engine_only import ttft_ms
from benchmarks.results import RESULTS, ROOT, save
from benchmarks.tables import table
from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request
from llama2.flags import check_counts, describe_options, run

WANTED_PREFIX = 1000
WANTED_RATIO = 0.2
ENGINE = EngineConfig()
SEED = 1


def measure(engine: Engine, *, prefix_tokens: int, suffix_tokens: int, rounds: int) -> dict[str, Any]:
    """Rank 0: ms to the first token for new and cached prefixes, and how many tokens the cache gave the latter."""
    numbers = random.Random(SEED)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(numbers.randrange(engine.args.vocab_size) for _ in range(count))

    def ask(name: str, prompt_ids: tuple[int, ...]) -> float:
        params = SamplingParams(max_new_tokens=1, temperature=0)
        return ttft_ms(engine, Request(request_id=name, prompt_ids=prompt_ids, params=params))

    ask("warm-up", ids(prefix_tokens + suffix_tokens))
    first, again, hits = [], [], []
    for index in range(rounds):
        prefix = ids(prefix_tokens)
        first.append(ask(f"first {index}", prefix + ids(suffix_tokens)))
        before = engine.stats().cached_tokens
        again.append(ask(f"again {index}", prefix + ids(suffix_tokens)))
        hits.append(engine.stats().cached_tokens - before)
    ratios = [one / other for one, other in zip(again, first, strict=True)]
    return {
        "first_ttft_ms": first,
        "repeated_ttft_ms": again,
        "cached_tokens": hits,
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }


@describe_options(EngineConfig)
def benchmark(
    *,
    checkpoint: str = str(ROOT / "build" / "converted_checkpoints"),
    prefix_tokens: int = WANTED_PREFIX,
    suffix_tokens: int = 24,
    rounds: int = 5,
    max_step_tokens: int = ENGINE.max_step_tokens,
    device: str | None = None,
    out: str = str(RESULTS / "prefix.json"),
) -> None:
    """Measure, print a row for each round, and write a JSON file.

    Args:
        checkpoint: a converted checkpoint.
        prefix_tokens: tokens that two prompts have in common.
        suffix_tokens: tokens that follow, and differ.
        rounds: how many prefixes are tried.
        device: cuda or cpu; by default the best available.
        out: the JSON file to write.
    """
    check_counts(
        prefix_tokens=prefix_tokens, suffix_tokens=suffix_tokens, rounds=rounds, max_step_tokens=max_step_tokens
    )
    config = EngineConfig(
        max_seq_len=prefix_tokens + suffix_tokens + 1, max_batch_size=2, max_step_tokens=max_step_tokens
    )
    engine = load_engine(checkpoint, device=device, config=config)
    if engine.rank != 0:
        engine.close()
        return
    figures = measure(engine, prefix_tokens=prefix_tokens, suffix_tokens=suffix_tokens, rounds=rounds)
    engine.close()
    columns = (figures["first_ttft_ms"], figures["repeated_ttft_ms"], figures["cached_tokens"])
    rows = [[f"{first:.1f}", f"{again:.1f}", str(hits)] for first, again, hits in zip(*columns, strict=True)]
    print(table(["first, ms", "repeated, ms", "tokens from the cache"], rows))
    ratio = figures["ratio"]
    wanted = f"; our target: at most {WANTED_RATIO}" if prefix_tokens == WANTED_PREFIX else ""
    print(f"\nrepeated / first: {ratio['median']:.3f} (from {ratio['min']:.3f} to {ratio['max']:.3f}{wanted})")
    settings = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens, "max_step_tokens": max_step_tokens}
    print(f"written to {save(out, 'prefix', settings, figures)}")


if __name__ == "__main__":
    run(benchmark)
