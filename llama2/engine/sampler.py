"""Owns the choice of the next token: from a row of logits and a request's SamplingParams to a token id.

Knows no model, no text and no schedule, and keeps no state of any sequence. A row's result depends on nothing but its
own logits, tokens and parameters, however the batch is put together.

The order of the steps: log-probabilities of the untouched logits; logit bias; grammar; repetition penalty; frequency
and presence penalty; temperature; top_k; top_p; min_p; draw. After the temperature a row is kept as weights,
probabilities relative to the likeliest token's, and every filter is a floor under which weights become 0. So tokens of
equal weight stay or go together, and nothing depends on the order in which a device sorts them.

Axes: R rows, N those rows that a step is about, V vocabulary, K candidates.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llama2.engine.sequence import MAX_LOGPROBS, SamplingParams, Sequence, TokenLogprobs

# How many of the likeliest tokens are looked at before a row is sorted whole: a nucleus is nearly always small, and
# sorting a large vocabulary costs more than all the rest together.
_CANDIDATES = (64, 1024)

# The width of the blocks in which weights are summed for the draw.
_BLOCK = 256


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
        logits_RV = _penalize(_restrict(logits.float(), sequences), sequences)
        peak_R, token_R = logits_RV.max(dim=-1)  # the first maximum: the lowest id where several are equal
        drawn = [row for row, sequence in enumerate(sequences) if sequence.request.params.temperature > 0]
        if drawn:
            token_R[drawn] = self._draw(
                _select(logits_RV, drawn), peak_R[drawn], token_R[drawn], [sequences[row] for row in drawn]
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
        weights_NV = (logits_NV - peak_N[:, None]).div_(temperature_N[:, None]).exp_()
        weights_NV = _filter(weights_NV, params)
        uniform = [self._uniform(sequence) for sequence in sequences]
        token_N = _invert(weights_NV, torch.tensor(uniform, dtype=torch.float64, device=device))
        # Where the two sums of `_invert` round apart, a number in the gap may fall on a token that is ruled out.
        is_possible_N = weights_NV.gather(-1, token_N[:, None])[:, 0] > 0
        return torch.where(is_possible_N, token_N, likeliest_N)

    def _uniform(self, sequence: Sequence) -> float:
        """The number in (0, 1) that decides the sequence's next token: the same on every device and version."""
        seed = sequence.request.params.seed
        if seed is None:
            stream = f"engine {self._seed} arrival {sequence.arrival}"
        else:
            stream = f"request {seed} reply {sequence.index}"
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


def _select(values_RV: Tensor, rows: list[int]) -> Tensor:
    """The rows in question, without a copy if that is all of them, as it mostly is."""
    return values_RV if len(rows) == len(values_RV) else values_RV[rows]


def _restrict(logits_RV: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Add the logit biases, and leave no chance to the tokens that a grammar forbids; other rows pass through."""
    rows = [row for row, one in enumerate(sequences) if one.matcher or one.request.params.logit_bias]
    if not rows:
        return logits_RV
    logits_RV = logits_RV.clone()  # the caller's own, where it was fp32 already
    for row in rows:
        bias, matcher = sequences[row].request.params.logit_bias, sequences[row].matcher
        if bias:
            values = torch.tensor(list(bias.values()), dtype=torch.float32, device=logits_RV.device)
            logits_RV[row, list(bias)] += values
        if matcher:
            matcher.restrict(logits_RV[row])
    return logits_RV


def _penalize(logits_RV: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Apply the penalties of those rows that have any; other rows pass through.

    Repetition (CTRL, arXiv:1909.05858, as in transformers): logits of tokens in prompt or reply are divided by it
    where positive, multiplied where negative. Frequency and presence (OpenAI's API reference): subtracted per
    occurrence, and once, from tokens of the reply alone.
    """
    rows: list[int] = []
    token_ids: list[int] = []
    counts: list[int] = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.params
        if (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0):
            continue
        occurrences = Counter(sequence.token_ids[sequence.num_prompt :])
        seen = [*occurrences.keys() | sequence.request.prompt_ids]
        rows += [row] * len(seen)
        token_ids += seen
        counts += [occurrences[token_id] for token_id in seen]
    if not rows:
        return logits_RV

    def tensor(values: list[int] | list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=logits_RV.device)

    # T: each token that a row has seen, once.
    row_T, token_T, count_T = tensor(rows, torch.int64), tensor(token_ids, torch.int64), tensor(counts)
    every = [sequence.request.params for sequence in sequences]
    limits = torch.finfo(torch.float32)
    repetition_T = tensor([params.repetition_penalty for params in every]).clamp_(min=limits.tiny)[row_T]
    presence_T = tensor([params.presence_penalty for params in every])[row_T]
    frequency_T = tensor([params.frequency_penalty for params in every])[row_T]
    logit_T = logits_RV[row_T, token_T]
    logit_T = torch.where(logit_T < 0, logit_T * repetition_T, logit_T / repetition_T)
    logit_T -= frequency_T * count_T + presence_T * (count_T > 0)
    # A tiny repetition penalty may overflow: that is the request's wish for these tokens, no fault of the model.
    return logits_RV.index_put((row_T, token_T), logit_T.clamp_(max=limits.max))


def _filter(weights_NV: Tensor, params: list[SamplingParams]) -> Tensor:
    """Set to 0, in place, what top_k, then top_p of the rest, then min_p leave out; the likeliest (weight 1) stay."""
    vocab_size, device = weights_NV.shape[-1], weights_NV.device
    if all(one.top_k == 0 and one.top_p == 1 and one.min_p == 0 for one in params):
        return weights_NV
    floor_N = torch.tensor([one.min_p for one in params], dtype=torch.float32, device=device)
    rows = [row for row, one in enumerate(params) if 0 < one.top_k < vocab_size or one.top_p < 1]
    if rows:
        top_k_N = torch.tensor([min(params[row].top_k or vocab_size, vocab_size) for row in rows], device=device)
        top_p_N = torch.tensor([params[row].top_p for row in rows], dtype=torch.float64, device=device)
        floor_N[rows] = torch.maximum(floor_N[rows], _nucleus_floor(_select(weights_NV, rows), top_k_N, top_p_N))
    return weights_NV.masked_fill_(weights_NV < floor_N[:, None], 0)


def _nucleus_floor(weights_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """The least weight that stays: of the top_k largest, the fewest that together reach top_p of their sum.

    Each row is settled with as few candidates as prove the answer; the last round has them all.
    """
    vocab_size = weights_NV.shape[-1]
    floor_N = weights_NV.new_empty(weights_NV.shape[0])
    open_N = torch.arange(weights_NV.shape[0], device=weights_NV.device)
    for size in [*(size for size in _CANDIDATES if size < vocab_size), vocab_size]:
        candidates_NK = weights_NV.topk(size, dim=-1).values
        has_top_k_N = top_k_N < vocab_size
        k_floor_N = candidates_NK.gather(-1, top_k_N.clamp(max=size)[:, None] - 1)[:, 0] * has_top_k_N
        kept_NV = torch.where(weights_NV < k_floor_N[:, None], 0, weights_NV) if has_top_k_N.any() else weights_NV
        mass_N = top_p_N * kept_NV.sum(dim=-1)
        cumulative_NK = candidates_NK.cumsum(dim=-1, dtype=torch.float64)
        # A candidate stays as long as those before it do not yet reach the mass.
        num_kept_N = (cumulative_NK - candidates_NK < mass_N[:, None]).sum(dim=-1)
        p_floor_N = candidates_NK.gather(-1, num_kept_N[:, None] - 1)[:, 0]
        floor_N[open_N] = torch.maximum(k_floor_N, p_floor_N)
        is_open_N = (has_top_k_N & (top_k_N > size)) | (cumulative_NK[:, -1] < mass_N)
        if not is_open_N.any():
            break
        open_N, weights_NV = open_N[is_open_N], weights_NV[is_open_N]
        top_k_N, top_p_N = top_k_N[is_open_N], top_p_N[is_open_N]
    return floor_N


def _invert(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The token at which the cumulated weights, in the order of the vocabulary, first reach `uniform` of their sum.

    In two levels, over sums of blocks and then inside one block: double precision, without a vocabulary's worth of it.
    """
    vocab_size = weights_NV.shape[-1]
    padding = -vocab_size % _BLOCK
    padded_NV = functional.pad(weights_NV, (0, padding)) if padding else weights_NV
    blocks_NBW = padded_NV.unflatten(-1, (-1, _BLOCK))
    sums_NB = blocks_NBW.sum(dim=-1).double()
    cumulative_NB = sums_NB.cumsum(dim=-1)
    target_N1 = uniform_N[:, None] * cumulative_NB[:, -1:]
    block_N1 = torch.searchsorted(cumulative_NB, target_N1)
    before_N1 = (cumulative_NB - sums_NB).gather(-1, block_N1)
    block_NW = blocks_NBW.take_along_dim(block_N1[:, :, None], dim=1)[:, 0].double()
    offset_N1 = torch.searchsorted(block_NW.cumsum(dim=-1), target_N1 - before_N1)
    return (block_N1 * _BLOCK + offset_N1)[:, 0].clamp_(max=vocab_size - 1)


def _logprobs(logits_RV: Tensor, token_ids: list[int], sequences: Items[Sequence]) -> dict[int, TokenLogprobs]:
    """By row, for those that ask: the model's own log-probabilities of the chosen token and of the likeliest ones."""
    wanted = {row: sequence.request.params.logprobs for row, sequence in enumerate(sequences)}
    rows = [row for row, number in wanted.items() if number is not None]
    if not rows:
        return {}
    found = token_logprobs(logits_RV[rows], [token_ids[row] for row in rows], [wanted[row] or 0 for row in rows])
    return dict(zip(rows, found, strict=True))


def token_logprobs(logits_NV: Tensor, token_ids: Items[int], num_top: Items[int]) -> list[TokenLogprobs]:
    """For each row the log-probability of its token and the `num_top` likeliest, under the model's own distribution."""
    logprobs_NV = logits_NV.float().log_softmax(dim=-1)
    chosen_N1 = torch.tensor([[token_id] for token_id in token_ids], device=logits_NV.device)
    chosen = logprobs_NV.gather(-1, chosen_N1)[:, 0].tolist()
    # Always the same number of them, so that ties do not fall otherwise for a row beside one that asks for more.
    top = logprobs_NV.topk(min(MAX_LOGPROBS, logprobs_NV.shape[-1]), dim=-1)
    result = []
    for token_id, logprob, values, ids, number in zip(
        token_ids, chosen, top.values.tolist(), top.indices.tolist(), num_top, strict=True
    ):
        ranked = sorted(zip(ids, values, strict=True), key=lambda pair: (-pair[1], pair[0]))
        result.append(TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(ranked[:number])))
    return result
