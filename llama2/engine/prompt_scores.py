"""Owns a prompt's own scores: log-probabilities of its tokens, or the raw logits.

Knows no steps: it is given logits in pieces, with their positions, from the first position on.
"""

from __future__ import annotations

import torch

from llama2.engine.logprobs import Logprobs
from llama2.engine.sequence import Request, TokenLogprobs
from llama2.engine.transfer import upload


class PromptScores:
    """The scores of one prompt. If it restarts at position 0, after a preemption, so do they."""

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
        if request.prompt_logprobs is not None and following:  # else there are only logits after the last position
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
