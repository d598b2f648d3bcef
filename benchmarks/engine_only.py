"""Runs the engine with no server in front, on the work of a load: the baseline for the front end's cost.

    torchrun --nproc_per_node 2 -m benchmarks.engine_only --checkpoint build/converted_checkpoints --clients 32 …

Rank 0 prints one line of JSON: the tokens/s of `requests` requests, `clients` of them live at any time, and the ms to
the first token of single requests.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Iterator

import fire

from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request

SEED = 1


def run(
    *,
    checkpoint: str,
    clients: int,
    requests: int,
    alone: int,
    prompt_tokens: int,
    output_tokens: int,
    max_seq_len: int,
    max_batch_size: int,
    max_step_tokens: int,
    device: str | None = None,
) -> None:
    """Measure, on every rank of the group. The sizes are those of `EngineConfig`; all requests have different prompts.

    Args:
        alone: how many requests are timed one at a time.
        device: cuda or cpu; by default the best available.
    """
    config = EngineConfig(max_seq_len=max_seq_len, max_batch_size=max_batch_size, max_step_tokens=max_step_tokens)
    engine = load_engine(checkpoint, device=device, config=config)
    if engine.rank != 0:
        engine.close()
        return
    numbers = random.Random(SEED)
    short = _requests(numbers, engine.args.vocab_size, prompt_tokens, 1)
    whole = _requests(numbers, engine.args.vocab_size, prompt_tokens, output_tokens)
    ttft_ms(engine, next(short))  # the first one warms up
    times = [ttft_ms(engine, one) for one in itertools.islice(short, alone)]
    tokens_per_s(engine, whole, clients=clients, requests=clients)
    rate = tokens_per_s(engine, whole, clients=clients, requests=requests)
    engine.close()
    print(json.dumps({"tokens_per_s": rate, "ttft_ms": statistics.median(times)}), flush=True)


def tokens_per_s(engine: Engine, made: Iterator[Request], *, clients: int, requests: int) -> float:
    """Generated tokens per second, from the first request until the last of them has ended."""
    start, tokens, left = time.perf_counter(), 0, requests
    for request in itertools.islice(made, min(clients, left)):
        engine.add(request)
        left -= 1
    while engine.has_work:
        for output in engine.step():
            tokens += len(output.token_ids)
            if output.finish_reason is not None and left:
                engine.add(next(made))
                left -= 1
    return tokens / (time.perf_counter() - start)


def ttft_ms(engine: Engine, request: Request) -> float:
    """From adding a single request of one token to that token."""
    start = time.perf_counter()
    engine.add(request)
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - start) * 1000


def _requests(numbers: random.Random, vocab_size: int, prompt_tokens: int, output_tokens: int) -> Iterator[Request]:
    """Requests of random prompts, each of exactly so many tokens, sampled as an OpenAI request is by default."""
    params = SamplingParams(max_new_tokens=output_tokens, temperature=1, top_p=1, ignore_eos=True)
    for index in itertools.count():
        ids = tuple(numbers.randrange(vocab_size) for _ in range(prompt_tokens))
        yield Request(request_id=str(index), prompt_ids=ids, params=params)


if __name__ == "__main__":
    fire.Fire(run)
