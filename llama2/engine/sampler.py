"""Owns the choice of the next token: from a row of logits and a request's SamplingParams to a token id.

Knows no model, no text and no schedule, and keeps no state of any sequence. A row's result depends on nothing but its
own logits, tokens and parameters, however the batch is put together.

The order of the steps: log-probabilities of the untouched logits; repetition penalty; frequency and presence penalty;
temperature; top_k; top_p; min_p; draw. After the temperature a row is kept as weights, probabilities relative to the
likeliest token's, and every filter is a floor under which weights become 0. So tokens of equal weight stay or go
together, and nothing depends on the order in which a device sorts them.

Axes: R rows, N those rows that a step is about, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from llama2.engine.sequence import MAX_LOGPROBS, SamplingParams, Sequence, TokenLogprobs

# How many of the likeliest tokens are looked at before a row is sorted whole: a nucleus is nearly always small, and
# sorting a large vocabulary costs more than all the rest together.
_CANDIDATES = (64, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token that one row gained; `logprobs` only where the request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Draws tokens, each from a stream of random numbers that belongs to its sequence alone.

    The number for a request's k-th token is a hash of its seed and k: no other request, batch or preemption can shift
    it. A request without a seed gets one from `seed` and its arrival; `seed=None` takes that from the system's entropy.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = random.SystemRandom().getrandbits(64) if seed is None else seed

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> list[Sampled]:
        """Choose the next token of each sequence.

        Args:
            logits: (rows, vocabulary), any floating type, on any device; not changed.
            sequences: one per row.

        Raises:
            FloatingPointError: a row holds NaN or +inf, or allows no token at all; the message names its request.
        """
        _check_finite(logits, sequences)
        logits_RV = _penalize(logits.float(), sequences)
        peak_R, token_R = logits_RV.max(dim=-1)  # the first maximum: the lowest id where several are equal
        drawn = [row for row, sequence in enumerate(sequences) if sequence.request.params.temperature > 0]
        if drawn:
            token_R[drawn] = self._draw(
                logits_RV[drawn], peak_R[drawn], token_R[drawn], [sequences[row] for row in drawn]
            )
        token_ids = token_R.tolist()
        logprobs = _logprobs(logits, token_ids, sequences)
        return [Sampled(token_id=token_id, logprobs=logprobs.get(row)) for row, token_id in enumerate(token_ids)]

    def _draw(self, logits_NV: Tensor, peak_N: Tensor, likeliest_N: Tensor, sequences: Items[Sequence]) -> Tensor:
        """Invert each row's cumulative distribution, in the order of the vocabulary, at one uniform number."""
        params = [sequence.request.params for sequence in sequences]
        device = logits_NV.device
        temperature_N = torch.tensor([one.temperature for one in params], dtype=torch.float32, device=device)
        # The peak becomes 0 before the division, so no temperature overflows; the clamp keeps 0 / 0 away.
        temperature_N.clamp_(min=torch.finfo(torch.float32).tiny)
        weights_NV = torch.exp((logits_NV - peak_N[:, None]) / temperature_N[:, None])
        weights_NV = _filter(weights_NV, params)
        cumulative_NV = weights_NV.cumsum(dim=-1, dtype=torch.float64)
        uniform = [self._uniform(sequence) for sequence in sequences]
        uniform_N = torch.tensor(uniform, dtype=torch.float64, device=device)
        target_N = uniform_N * cumulative_NV[:, -1]
        token_N1 = torch.searchsorted(cumulative_NV, target_N[:, None], right=True).clamp_(max=weights_NV.shape[-1] - 1)
        # Only rounding at the very end of the range, or in a parallel sum, can land beside the weights.
        possible_N = weights_NV.gather(-1, token_N1)[:, 0] > 0
        return torch.where(possible_N, token_N1[:, 0], likeliest_N)

    def _uniform(self, sequence: Sequence) -> float:
        """The number in (0, 1) that decides the sequence's next token: the same on every device and version."""
        seed = sequence.request.params.seed
        stream = f"engine {self._seed} arrival {sequence.arrival}" if seed is None else f"request {seed}"
        digest = hashlib.blake2b(f"{stream} token {sequence.num_generated}".encode(), digest_size=8).digest()
        # 52 bits and a half: exact in a double, and never 0 or 1.
        return ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52


def _check_finite(logits_RV: Tensor, sequences: Items[Sequence]) -> None:
    is_finite = torch.isfinite(logits_RV.amax(dim=-1)).tolist()  # amax hands a NaN on
    for sequence, finite in zip(sequences, is_finite, strict=True):
        if not finite:
            raise FloatingPointError(
                f"the logits of request {sequence.request.request_id!r} at position {len(sequence.token_ids)} hold "
                f"NaN or infinity"
            )


def _penalize(logits_RV: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Apply the penalties of those rows that have any; other rows pass through.

    Repetition (CTRL, arXiv:1909.05858, as in transformers): logits of tokens in prompt or reply are divided by it
    where positive, multiplied where negative. Frequency and presence (OpenAI's API reference): subtracted per
    occurrence, and once, from tokens of the reply alone.
    """
    rows = [row for row, sequence in enumerate(sequences) if _has_penalty(sequence.request.params)]
    if not rows:
        return logits_RV
    sequences = [sequences[row] for row in rows]
    params = [sequence.request.params for sequence in sequences]
    vocab_size, device = logits_RV.shape[-1], logits_RV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    limits = torch.finfo(torch.float32)
    repetition_N1 = column([one.repetition_penalty for one in params]).clamp_(min=limits.tiny)
    seen_NV = _count([sequence.token_ids for sequence in sequences], vocab_size, device) > 0
    count_NV = _count([sequence.token_ids[sequence.num_prompt :] for sequence in sequences], vocab_size, device)
    logits_NV = logits_RV[rows]
    repeated_NV = torch.where(logits_NV < 0, logits_NV * repetition_N1, logits_NV / repetition_N1)
    penalized_NV = torch.where(seen_NV, repeated_NV, logits_NV)
    penalized_NV -= column([one.frequency_penalty for one in params]) * count_NV
    penalized_NV -= column([one.presence_penalty for one in params]) * (count_NV > 0)
    # A tiny repetition penalty may overflow: that is the request's wish for these tokens, no fault of the model.
    return logits_RV.index_copy(0, torch.tensor(rows, device=device), penalized_NV.clamp_(max=limits.max))


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _count(token_ids: list[list[int]], vocab_size: int, device: torch.device) -> Tensor:
    """How often each token occurs in each list: (lists, vocab_size), float."""
    flat = [row * vocab_size + token_id for row, ids in enumerate(token_ids) for token_id in ids]
    counts = torch.zeros(len(token_ids) * vocab_size, dtype=torch.float32, device=device)
    index = torch.tensor(flat, dtype=torch.int64, device=device)
    return counts.scatter_add_(0, index, torch.ones_like(index, dtype=torch.float32)).view(len(token_ids), vocab_size)


def _filter(weights_NV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Set to 0 what top_k, then top_p of the rest, then min_p leave out. The likeliest token, of weight 1, stays."""
    vocab_size, device = weights_NV.shape[-1], weights_NV.device
    if all(one.top_k == 0 and one.top_p == 1 and one.min_p == 0 for one in params):
        return weights_NV
    floor_N = torch.tensor([one.min_p for one in params], dtype=torch.float32, device=device)
    rows = [row for row, one in enumerate(params) if 0 < one.top_k < vocab_size or one.top_p < 1]
    if rows:
        top_k_N = torch.tensor([params[row].top_k or vocab_size for row in rows], device=device).clamp_(max=vocab_size)
        top_p_N = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64, device=device)
        floor_N[rows] = torch.maximum(floor_N[rows], _nucleus_floor(weights_NV[rows], top_k_N, top_p_N))
    return torch.where(weights_NV < floor_N[:, None], 0, weights_NV)


def _nucleus_floor(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """The least weight that stays: of the top_k largest, the fewest that together reach top_p of their sum.

    Each row is settled with as few candidates as prove the answer; the last round has them all.
    """
    vocab_size = weights_NV.shape[-1]
    floor_N = weights_NV.new_empty(weights_NV.shape[0])
    open_N = torch.arange(weights_NV.shape[0], device=weights_NV.device)
    for size in [*(size for size in _CANDIDATES if size < vocab_size), vocab_size]:
        weights_MV, top_k_M, top_p_M = weights_NV[open_N], top_k_N[open_N], top_p_N[open_N]
        candidates_MK = weights_MV.topk(size, dim=-1).values
        k_floor_M = candidates_MK.gather(-1, top_k_M.clamp(max=size)[:, None] - 1)[:, 0]
        k_floor_M = torch.where(top_k_M < vocab_size, k_floor_M, 0)
        kept_MV = torch.where(weights_MV < k_floor_M[:, None], 0, weights_MV)
        mass_M = top_p_M * kept_MV.sum(dim=-1, dtype=torch.float64)
        cumulative_MK = candidates_MK.cumsum(dim=-1, dtype=torch.float64)
        # A candidate stays as long as those before it do not yet reach the mass.
        num_kept_M = (cumulative_MK - candidates_MK < mass_M[:, None]).sum(dim=-1)
        p_floor_M = candidates_MK.gather(-1, num_kept_M[:, None] - 1)[:, 0]
        floor_N[open_N] = torch.maximum(k_floor_M, p_floor_M)
        top_k_is_known_M = (top_k_M <= size) | (top_k_M == vocab_size)
        open_N = open_N[~(top_k_is_known_M & (cumulative_MK[:, -1] >= mass_M))]
        if not len(open_N):
            break
    return floor_N


def _logprobs(logits_RV: Tensor, token_ids: list[int], sequences: Items[Sequence]) -> dict[int, TokenLogprobs]:
    """By row, for those that ask: the model's own log-probabilities of the chosen token and of the likeliest ones."""
    wanted = {row: sequence.request.params.logprobs for row, sequence in enumerate(sequences)}
    rows = [row for row, number in wanted.items() if number is not None]
    if not rows:
        return {}
    logprobs_NV = logits_RV[rows].float().log_softmax(dim=-1)
    chosen_N1 = torch.tensor([[token_ids[row]] for row in rows], device=logits_RV.device)
    chosen = logprobs_NV.gather(-1, chosen_N1)[:, 0].tolist()
    # Always the same number of them, so that ties do not fall otherwise for a row beside one that asks for more.
    top = logprobs_NV.topk(min(MAX_LOGPROBS, logprobs_NV.shape[-1]), dim=-1)
    result = {}
    for row, logprob, values, ids in zip(rows, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
        ranked = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        result[row] = TokenLogprobs(token_id=token_ids[row], logprob=logprob, top=tuple(ranked[: wanted[row]]))
    return result
