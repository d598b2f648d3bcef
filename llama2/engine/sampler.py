"""Owns the choice of the next token: from a row of logits and a request's SamplingParams to a token id.

Knows no model, no text and no schedule, and keeps no state of any sequence. A row's result depends only on its own
logits, tokens and parameters, whatever else is in the batch.

The order of the steps: log-probabilities of the untouched logits; logit bias; grammar; repetition penalty; frequency
and presence penalty; temperature; top_k; top_p; min_p; draw. After the temperature a row is kept as weights,
probabilities relative to the most likely token's, and every filter is a floor below which weights become 0. So tokens
of equal weight are kept or dropped together, and nothing depends on the order in which a device sorts them.

On a GPU the host waits only for the ids, and only when it reads them; an error takes the place of an id.

Axes: R rows, N the rows that a step applies to, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from llama2.engine.logprobs import Logprobs
from llama2.engine.nucleus import nucleus_floor
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request, Sequence, TokenLogprobs
from llama2.engine.token_masks import forbid
from llama2.engine.transfer import Download, row_index, select, upload

# In place of an id: the row holds NaN or infinity.
_BROKEN = -1

# The width of the blocks in which a row is searched.
_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token that one row gained; `logprobs` only where the request asks for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Choice:
    """The tokens that sequences gain, one each; the device may still be choosing them.

    `ids_R` (R,), int64, are these tokens on the device; where `read` will raise, they are not ids.
    """

    def __init__(self, ids_R: Tensor, logits_RV: Tensor, sequences: Items[Sequence]) -> None:
        self.ids_R = ids_R
        self._download = Download(ids_R)
        self._sequences = sequences
        wanted = {row: one.request.params.logprobs for row, one in enumerate(sequences)}
        self._num_top = {row: number for row, number in wanted.items() if number is not None}
        self._logprobs: Logprobs | None = None
        if self._num_top:
            rows_N = row_index(list(self._num_top), logits_RV)
            self._logprobs = Logprobs(select(logits_RV, rows_N), select(ids_R, rows_N).clamp(min=0))

    def read(self) -> list[Sampled]:
        """Wait for the tokens.

        Raises:
            FloatingPointError: a row held NaN or +inf, or allowed no token at all; the message names its request.
        """
        (token_ids,) = self._download.wait()
        for sequence, token_id in zip(self._sequences, token_ids, strict=True):
            if token_id == _BROKEN:
                raise FloatingPointError(
                    f"the logits of request {sequence.request.request_id!r} at position {len(sequence.token_ids)} hold "
                    "NaN or infinity"
                )
        logprobs: dict[int, TokenLogprobs] = {}
        if self._logprobs is not None:
            logprobs = dict(zip(self._num_top, self._logprobs.wait(list(self._num_top.values())), strict=True))
        return [Sampled(token_id=token_id, logprobs=logprobs.get(row)) for row, token_id in enumerate(token_ids)]


class Sampler:
    """Draws tokens, each from a stream of random numbers that belongs to its sequence alone.

    The number for a request's k-th token is a hash of its seed and k: no other request, batch or preemption can shift
    it. A request without a seed gets one from `seed` and its arrival; `seed=None` draws it from the system's entropy.
    """

    def __init__(self, seed: int | None = None, *, eos_ids: Collection[int] = ()) -> None:
        """`eos_ids` are those that a reply without its `min_tokens` does not get."""
        self._eos_ids = eos_ids
        self._seed = random.SystemRandom().getrandbits(64) if seed is None else seed

    @torch.inference_mode()
    def sample(self, logits: Tensor, sequences: Items[Sequence]) -> Choice:
        """Choose the next token of each sequence.

        Args:
            logits: (rows, vocabulary), any floating type, on any device; unchanged; may be overwritten afterwards.
            sequences: one per row.
        """
        own_RV = logits.float()
        logits_RV = _penalize(_restrict(self._bias(own_RV, sequences), sequences), sequences)
        peak_R, likeliest_R = _maximum(logits_RV)
        # A maximum propagates NaN.
        is_sound_R = torch.isfinite(peak_R if logits_RV is own_RV else own_RV.amax(dim=-1))
        token_R = torch.where(is_sound_R, likeliest_R, _BROKEN)
        rows = [row for row, sequence in enumerate(sequences) if sequence.request.params.temperature > 0]
        if rows:
            at_N = row_index(rows, logits)
            drawn_N = self._draw(
                select(logits_RV, at_N),
                select(peak_R, at_N),
                select(likeliest_R, at_N),
                [sequences[row] for row in rows],
            )
            token_R = _put(token_R, at_N, torch.where(select(is_sound_R, at_N), drawn_N, _BROKEN))
        return Choice(token_R, logits, sequences)

    def _bias(self, logits_RV: Tensor, sequences: Items[Sequence]) -> Tensor:
        """Add the logit biases of those rows that have any; other rows pass through."""
        biases = [
            (row, token_id, bias)
            for row, sequence in enumerate(sequences)
            for token_id, bias in self._biases(sequence).items()
        ]
        if not biases:
            return logits_RV
        # T: each token that a row is biased for; its numbers are exact in a double.
        row_T, token_T, bias_T = upload(biases, logits_RV, torch.float64).unbind(-1)
        at_T = row_T.long(), token_T.long()
        return logits_RV.index_put(at_T, logits_RV[at_T] + bias_T.float())

    def _biases(self, sequence: Sequence) -> Mapping[int, float]:
        params = sequence.request.params
        if sequence.num_generated >= params.min_tokens or sequence.matcher is not None:
            return params.logit_bias
        return {**params.logit_bias, **dict.fromkeys((*self._eos_ids, *params.stop_token_ids), -math.inf)}

    def _draw(self, logits_NV: Tensor, peak_N: Tensor, likeliest_N: Tensor, sequences: Items[Sequence]) -> Tensor:
        """Invert each row's cumulative distribution, in the order of the vocabulary, at one uniform number."""
        params = [sequence.request.params for sequence in sequences]
        vocab_size = logits_NV.shape[-1]
        numbers = [
            [one.temperature for one in params],
            [one.min_p for one in params],
            [min(one.top_k or vocab_size, vocab_size) for one in params],
            [one.top_p for one in params],
            [self._uniform(sequence) for sequence in sequences],
        ]
        temperature_N, min_p_N, top_k_N, top_p_N, uniform_N = upload(numbers, logits_NV, torch.float64).unbind()
        # The peak becomes 0 before the division, so no temperature overflows; the clamp avoids 0 / 0.
        temperature_N = temperature_N.float().clamp_(min=torch.finfo(torch.float32).tiny)
        weights_NV = (logits_NV - peak_N[:, None]).div_(temperature_N[:, None]).exp_()
        has_nucleus = any(0 < one.top_k < vocab_size or one.top_p < 1 for one in params)
        if has_nucleus or any(one.min_p for one in params):
            floor_N = min_p_N.float()
            if has_nucleus:
                floor_N = torch.maximum(floor_N, nucleus_floor(weights_NV, top_k_N.long(), top_p_N))
            weights_NV.masked_fill_(weights_NV < floor_N[:, None], 0)
        token_N = _invert(weights_NV, uniform_N)
        # Where the two sums of `_invert` round differently, a number in the gap may fall on an excluded token.
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


def warm_up(vocab_size: int, batch_size: int, device: torch.device) -> None:
    """Sample from dummy logits, so that no request has to wait for kernels to compile and load.

    A full batch, so that its memory is known to be available.
    """
    greedy = SamplingParams(temperature=0, logprobs=0)
    filtered = SamplingParams(top_k=1, top_p=0.5, min_p=0.1, repetition_penalty=1.1, logit_bias={0: 1.0})
    logits_RV = torch.zeros(batch_size, vocab_size, device=device)
    # One row of another kind: then a step selects some of the rows.
    for first, rest in ((greedy, greedy), (filtered, filtered), (greedy, filtered)):
        kinds = [first, *[rest] * (batch_size - 1)]
        requests = [Request(request_id="warm-up", prompt_ids=(0,), params=one) for one in kinds]
        Sampler().sample(logits_RV, [Sequence.of(one, row) for row, one in enumerate(requests)]).read()


def _put(values_R: Tensor, rows_N: Tensor | None, values_N: Tensor) -> Tensor:
    """`values_R` with `values_N` in those rows."""
    return values_N if rows_N is None else values_R.index_copy(0, rows_N, values_N)


def _restrict(logits_RV: Tensor, sequences: Items[Sequence]) -> Tensor:
    """Exclude the tokens that a grammar forbids; rows without one pass through."""
    matchers = {row: one.matcher for row, one in enumerate(sequences) if one.matcher is not None}
    if not matchers:
        return logits_RV
    at_N = row_index(list(matchers), logits_RV)
    masks = [matcher.mask_W() for matcher in matchers.values()]
    return _put(logits_RV, at_N, forbid(select(logits_RV, at_N), masks))


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

    # T: each token that a row has seen, once.
    row_T, token_T, count_T = upload([rows, token_ids, counts], logits_RV).unbind()
    every = [sequence.request.params for sequence in sequences]
    limits = torch.finfo(torch.float32)
    penalties = [[one.repetition_penalty, one.presence_penalty, one.frequency_penalty] for one in every]
    repetition_T, presence_T, frequency_T = upload(penalties, logits_RV, torch.float32)[row_T].unbind(-1)
    repetition_T = repetition_T.clamp(min=limits.tiny)
    logit_T = logits_RV[row_T, token_T]
    logit_T = torch.where(logit_T < 0, logit_T * repetition_T, logit_T / repetition_T)
    logit_T -= frequency_T * count_T + presence_T * (count_T > 0)
    # A tiny repetition penalty may overflow: the request asked for it, and it is no fault of the model.
    return logits_RV.index_put((row_T, token_T), logit_T.clamp_(max=limits.max))


def _blocks(values_NV: Tensor, fill: float) -> Tensor:
    """(N, blocks, width): a view, or a copy padded where the vocabulary does not end with a block."""
    padding = -values_NV.shape[-1] % _BLOCK
    padded_NV = functional.pad(values_NV, (0, padding), value=fill) if padding else values_NV
    return padded_NV.unflatten(-1, (-1, _BLOCK))


def _maximum(values_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each row and its first index: the lowest id of several that are equal.

    As `max(dim=-1)`, which on a CPU takes 7 times as long (32 rows of 49,152): it tracks the index at every value.
    """
    blocks_NBW = _blocks(values_NV, -torch.inf)
    peak_N, block_N = blocks_NBW.amax(dim=-1).max(dim=-1)
    offset_N = blocks_NBW[torch.arange(len(block_N), device=block_N.device), block_N].max(dim=-1).indices
    return peak_N, block_N * _BLOCK + offset_N


def _invert(weights_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The token at which the cumulative weights, in the order of the vocabulary, first reach `uniform` of their sum.

    In two levels, over sums of blocks and then inside one block: double precision without a vocabulary of doubles.
    """
    blocks_NBW = _blocks(weights_NV, 0.0)
    sums_NB = blocks_NBW.sum(dim=-1).double()
    cumulative_NB = sums_NB.cumsum(dim=-1)
    target_N1 = uniform_N[:, None] * cumulative_NB[:, -1:]
    # In a row of NaN, which is refused later, the search ends past the last block.
    block_N1 = torch.searchsorted(cumulative_NB, target_N1).clamp_(max=cumulative_NB.shape[-1] - 1)
    before_N1 = (cumulative_NB - sums_NB).gather(-1, block_N1)
    block_NW = blocks_NBW.take_along_dim(block_N1[:, :, None], dim=1)[:, 0].double()
    offset_N1 = torch.searchsorted(block_NW.cumsum(dim=-1), target_N1 - before_N1)
    return (block_N1 * _BLOCK + offset_N1)[:, 0].clamp_(max=weights_NV.shape[-1] - 1)
