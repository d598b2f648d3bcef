"""Owns what a request wants to know of its own prompt: log-probabilities of the tokens, or the raw logits.

Knows no steps: it is told which positions some logits belong to, in pieces, from the first position on.
"""

from __future__ import annotations

import torch

from llama2.engine.logprobs import Logprobs
from llama2.engine.sequence import Request, TokenLogprobs
from llama2.engine.transfer import upload


class PromptScores:
    """The scores of one prompt. If it starts again at position 0, after a preemption, they are collected anew."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._logits: list[torch.Tensor] = []
        self._logprobs: list[TokenLogprobs | None] = []

    def keep(self, start: int, logits_TV: torch.Tensor) -> None:
        """Note the logits after the prompt's positions [start, start + T)."""
        request = self._request
        if start == 0:
            self._logits, self._logprobs = [], [None]
        if request.score:
            self._logits.append(logits_TV.cpu())
        following = request.prompt_ids[start + 1 : start + 1 + logits_TV.shape[0]]
        if request.prompt_logprobs is not None and following:  # else these are the logits after the last position alone
            found = Logprobs(logits_TV[: len(following)], upload(list(following), logits_TV))
            self._logprobs += found.wait([request.prompt_logprobs] * len(following))

    @property
    def logprobs(self) -> tuple[TokenLogprobs | None, ...]:
        """One for each position of the prompt, None for the first; nothing if they were not asked for."""
        return () if self._request.prompt_logprobs is None else tuple(self._logprobs)

    @property
    def logits(self) -> torch.Tensor | None:
        """(prompt, V) fp32 on the CPU; None if they were not asked for."""
        return torch.cat(self._logits) if self._request.score else None
