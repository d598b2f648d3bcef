"""Owns log-probabilities under the model's own distribution: of a token, and of the most likely ones.

Knows no requests: rows of logits in, `TokenLogprobs` out.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from torch import Tensor

from llama2.engine.sampling_params import MAX_LOGPROBS
from llama2.engine.sequence import TokenLogprobs
from llama2.engine.transfer import Download


class Logprobs:
    """Log-probabilities of one token per row and of the most likely ones; the device may still be computing them."""

    def __init__(self, logits_NV: Tensor, token_N: Tensor) -> None:
        logprobs_NV = logits_NV.float().log_softmax(dim=-1)
        chosen_N = logprobs_NV.gather(-1, token_N[:, None])[:, 0]
        # Always the same number, so that ties in a row do not depend on how many another row asks for.
        top = logprobs_NV.topk(min(MAX_LOGPROBS, logprobs_NV.shape[-1]), dim=-1)
        self._download = Download(token_N, chosen_N, top.values, top.indices)

    def wait(self, num_top: Items[int]) -> list[TokenLogprobs]:
        """For each row, with the `num_top` most likely; of equal ones the lowest ids first."""
        result = []
        for token_id, logprob, values, ids, number in zip(*self._download.wait(), num_top, strict=True):
            ranked = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
            result.append(TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(ranked[:number])))
        return result
