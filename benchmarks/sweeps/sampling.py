"""Times the choice of the next token: the engine's Sampler, until the host has the ids, and its parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.sweeps.bench import Bench, Calls
from llama2.config import ModelArgs
from llama2.engine.sampler import Sampler
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request, Sequence

ROWS = (1, 64)
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn from all": {"temperature": 1, "top_p": 1},
    "top_p": {"temperature": 1, "top_p": 0.9},
    "top_k": {"temperature": 1, "top_p": 1, "top_k": 50},
}
CANDIDATES = 1024


def measure(bench: Bench, args: ModelArgs) -> None:
    """Bytes are those of the logits, read once."""
    for rows in ROWS:
        nbytes = rows * args.vocab_size * 4
        for name, params in PARAMS.items():
            prepare = partial(_sampler, bench, rows, args.vocab_size, params)
            bench.row(f"Sampler, {name}, {rows} rows, with the host", prepare, nbytes=nbytes, recorded=False)
        for name, part in _parts(min(CANDIDATES, args.vocab_size)).items():
            bench.row(f"{name}, {rows} rows", partial(_part, bench, rows, args.vocab_size, part), nbytes=nbytes)
        bench.row(f"nucleus_floor, {rows} rows", partial(_nucleus, bench, rows, args.vocab_size), nbytes=nbytes)


def _parts(candidates: int) -> dict[str, Callable[[torch.Tensor], object]]:
    return {
        "argmax": lambda logits: logits.argmax(dim=-1),
        f"topk({candidates})": lambda logits: logits.topk(candidates, dim=-1),
        "sort": lambda logits: logits.sort(dim=-1, descending=True),
        "softmax and cumsum": lambda logits: logits.softmax(dim=-1).cumsum(dim=-1),
    }


def _sampler(bench: Bench, rows: int, vocab_size: int, params: dict[str, Any]) -> Calls:
    logits = _logits(bench, rows, vocab_size)
    sequences = [
        Sequence.of(Request(request_id=str(row), prompt_ids=(1,), params=SamplingParams(**params)), row)
        for row in range(rows)
    ]
    sampler = Sampler(0)
    return [lambda: sampler.sample(logits, sequences).read()]


def _part(bench: Bench, rows: int, vocab_size: int, part: Any) -> Calls:
    return [partial(part, _logits(bench, rows, vocab_size))]


def _nucleus(bench: Bench, rows: int, vocab_size: int) -> Calls:
    """The engine's replacement for a sort."""
    from llama2.kernels.cuda.sampling import nucleus_floor

    weights = _logits(bench, rows, vocab_size).softmax(dim=-1)
    top_k = torch.full((rows,), vocab_size, device=bench.device)
    return [partial(nucleus_floor, weights, top_k, torch.full((rows,), 0.9, dtype=torch.float64, device=bench.device))]


def _logits(bench: Bench, rows: int, vocab_size: int) -> torch.Tensor:
    """As spread as a model's: most of the weight is on some tens of tokens."""
    return 3 * torch.randn(rows, vocab_size, device=bench.device)
