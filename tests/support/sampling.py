"""Logits and sequences for the sampler."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import torch

from llama2.engine.sampler import Sampler
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request, Sequence

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
FILTERS: dict[str, Any] = {"top_k": 120, "top_p": 0.9, "min_p": 0.02}
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": -0.4}
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    PLAIN,
    {**PLAIN, "seed": 5},
    {"temperature": 1.5, "top_p": 0.999},
    {"top_k": 3, "logprobs": 2},
    {"top_k": 100, "top_p": 1.0},
    {"temperature": 2.0, "min_p": 0.3, "top_p": 1.0},
    {"temperature": 0.0, "repetition_penalty": 5.0, "logprobs": 5},
    {"frequency_penalty": 2.0, "presence_penalty": 2.0},
    {**FILTERS, **PENALTIES, "logprobs": 0},
]


def make_sequence(
    arrival: int = 0, *, prompt: Items[int] = (0, 1), generated: Items[int] = (), **params: Any
) -> Sequence:
    request = Request(request_id=f"r{arrival}", prompt_ids=tuple(prompt), params=SamplingParams(**params))
    sequence = Sequence.of(request, arrival)
    sequence.token_ids += generated
    return sequence


def make_logits(rows: int, vocab_size: int, *, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def sample_ids(logits: torch.Tensor, sequences: list[Sequence], sampler: Sampler | None = None) -> list[int]:
    return [one.token_id for one in (sampler or Sampler(0)).sample(logits, sequences).read()]
