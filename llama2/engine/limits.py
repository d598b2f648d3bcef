"""Owns which requests an engine can ever run. Knows no engine: whoever sends requests to one can ask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llama2.engine.sequence import Request
from llama2.errors import InvalidValue, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one engine: ids of its model, tokens of a sequence, and sequences that are computed together."""

    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    max_loras: int = 0

    def check(self, request: Request) -> None:
        """Refuse a request that can never run.

        Raises:
            InvalidValue: it is empty or too long, wants too many replies or an adapter where there is none, or an id is
                outside the vocabulary.
        """
        length, longest = len(request.prompt_ids), self.max_seq_len
        room = longest - request.generate
        if not 1 <= length <= room:
            reply = " and the reply needs at least one" if request.generate else ""
            raise InvalidValue(
                "prompt_ids", f"must have from 1 to {room} tokens, got {length}: max_seq_len is {longest}{reply}"
            )
        if request.n > self.max_batch_size:
            raise InvalidValue("n", f"must be at most max_batch_size={self.max_batch_size}, got {request.n}")
        if request.adapter is not None and not self.max_loras:
            raise InvalidValue(
                "adapter", "cannot be had: max_loras is 0, no room for any; LLM(…, max_loras=8) has some"
            )
        params = request.params
        check_ids("prompt_ids", request.prompt_ids, self.vocab_size)
        check_ids("stop_token_ids", params.stop_token_ids, self.vocab_size)
        check_ids("logit_bias", params.logit_bias, self.vocab_size)


def check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raises InvalidValue: an id is outside the vocabulary."""
    wrong = [token_id for token_id in ids if not 0 <= token_id < vocab_size]
    if wrong:
        raise InvalidValue(field, f"must hold token ids from 0 to {vocab_size - 1}, got {shown(wrong[0])}")
