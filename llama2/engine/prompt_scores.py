"""Owns what requests want to know of their own prompts: log-probabilities of the tokens, or the raw logits.

Knows no steps: it is told which positions some logits belong to, in pieces, from the first position on.
"""

from __future__ import annotations

import torch

from llama2.engine.logprobs import Logprobs
from llama2.engine.sequence import Sequence, TokenLogprobs
from llama2.engine.transfer import upload


class PromptScores:
    """Collects by arrival. A prompt that starts again at position 0, after a preemption, is collected anew."""

    def __init__(self) -> None:
        self._logits: dict[int, list[torch.Tensor]] = {}
        self._logprobs: dict[int, list[TokenLogprobs | None]] = {}

    def __len__(self) -> int:
        return len(self._logits) + len(self._logprobs)

    def keep(self, sequence: Sequence, start: int, logits_TV: torch.Tensor) -> None:
        """Note the logits after the prompt's positions [start, start + T)."""
        request = sequence.request
        if request.score:
            parts = self._logits.setdefault(sequence.arrival, [])
            if start == 0:
                parts.clear()
            parts.append(logits_TV.cpu())
        if request.prompt_logprobs is not None:
            known = self._logprobs.setdefault(sequence.arrival, [])
            if start == 0:
                known[:] = [None]
            following = request.prompt_ids[start + 1 : start + 1 + logits_TV.shape[0]]
            if following:  # else these are the logits after the last position alone
                found = Logprobs(logits_TV[: len(following)], upload(list(following), logits_TV))
                known += found.wait([request.prompt_logprobs] * len(following))

    def take_logprobs(self, sequence: Sequence) -> tuple[TokenLogprobs | None, ...]:
        """One for each position of the prompt, None for the first; nothing if they were not asked for, or taken."""
        return tuple(self._logprobs.pop(sequence.arrival, ()))

    def take_logits(self, sequence: Sequence) -> torch.Tensor | None:
        """(prompt, V) fp32 on the CPU, once; None if they were not asked for."""
        parts = self._logits.pop(sequence.arrival, None)
        return None if parts is None else torch.cat(parts)

    def forget(self, sequence: Sequence) -> None:
        self._logits.pop(sequence.arrival, None)
        self._logprobs.pop(sequence.arrival, None)
