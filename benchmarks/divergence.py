"""Owns how far two models' logits are from each other: sums over a text, a window at a time.

Knows no model and no file. Letters: T tokens of a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from statistics import fmean, median, stdev

import torch

from llama2.weights.certificate import Figures

# Rows whose distributions are held at once.
_ROWS = 64


class Divergence:
    """A model against a reference, from their logits after the same tokens. Log-probabilities are fp32, sums fp64."""

    def __init__(self) -> None:
        self._own: list[torch.Tensor] = []
        self._reference: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._agreed = 0
        self._difference_sum = 0.0
        self._difference_max = 0.0
        self._logits = 0

    def add(self, own_TV: torch.Tensor, reference_TV: torch.Tensor, next_T: torch.Tensor) -> None:
        """Logits (fp32) of a window's tokens, and the ids that follow."""
        own, reference, kl = [], [], []
        for rows in zip(own_TV.split(_ROWS), reference_TV.split(_ROWS), next_T.split(_ROWS), strict=True):
            own_RV, reference_RV, next_R = rows
            own_logprobs_RV = own_RV.log_softmax(-1)
            reference_logprobs_RV = reference_RV.log_softmax(-1)
            own.append(_chosen(own_logprobs_RV, next_R))
            reference.append(_chosen(reference_logprobs_RV, next_R))
            terms_RV = reference_logprobs_RV.exp() * (reference_logprobs_RV - own_logprobs_RV)
            kl.append(terms_RV.sum(-1, dtype=torch.float64))
            self._agreed += int((own_RV.argmax(-1) == reference_RV.argmax(-1)).sum())
            differences_RV = (own_RV - reference_RV).abs()
            self._difference_sum += float(differences_RV.sum(dtype=torch.float64))
            self._difference_max = max(self._difference_max, float(differences_RV.max()))
            self._logits += differences_RV.numel()
        self._own.append(torch.cat(own))
        self._reference.append(torch.cat(reference))
        self._kl.append(torch.cat(kl))

    def figures(self, replies: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Figures:
        """All that was added, two windows or more of one size; `replies` are both models' greedy ones."""
        kl, differences = (
            torch.cat(self._kl),
            [float((reference - own).mean()) for own, reference in zip(self._own, self._reference, strict=True)],
        )
        agreements = [_agreement(*pair) for pair in replies]
        return Figures(
            tokens=len(kl),
            ln_perplexity=-float(torch.cat(self._own).mean()),
            reference_ln_perplexity=-float(torch.cat(self._reference).mean()),
            ln_perplexity_ratio=fmean(differences),
            ln_perplexity_ratio_error=stdev(differences) / len(differences) ** 0.5,
            kl_mean=float(kl.mean()),
            kl_median=float(kl.median()),
            kl_p99=float(kl.quantile(0.99)),
            kl_max=float(kl.max()),
            top1_agreement=self._agreed / len(kl),
            logit_difference_mean=self._difference_sum / self._logits,
            logit_difference_max=self._difference_max,
            greedy_prompts=len(replies),
            greedy_tokens=max(len(own) for own, _ in replies),
            greedy_agreement_mean=fmean(agreements),
            greedy_agreement_median=float(median(agreements)),
        )


def _chosen(logprobs_RV: torch.Tensor, ids_R: torch.Tensor) -> torch.Tensor:
    return logprobs_RV.gather(-1, ids_R[:, None])[:, 0].double()


def _agreement(own: Sequence[int], reference: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(own, reference, strict=False)))
