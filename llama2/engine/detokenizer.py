"""Owns the way from a sequence's ids to its Output: the text that is safe to show, and the finish reason.

Knows no steps: it is given each token that a sequence gains.
"""

from __future__ import annotations

from llama2.engine.sampler import Sampled
from llama2.engine.sequence import FinishReason, Output, Sequence
from llama2.text.text_stream import TextStream
from llama2.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the ids of all sequences into text. Its state per sequence is kept in the sequence."""

    def __init__(self, tokenizer: Tokenizer, max_seq_len: int) -> None:
        self._tokenizer = tokenizer
        self._max_seq_len = max_seq_len

    def open(self, sequence: Sequence) -> None:
        request = sequence.request
        sequence.text = TextStream(self._tokenizer, stop=request.params.stop, continues_prompt=request.continues_prompt)

    def extend(self, sequence: Sequence, sampled: Sampled) -> Output:
        """Turn a sequence's newest token into text, and decide whether it was the last."""
        params, stream = sequence.request.params, sequence.text
        assert stream is not None
        token_id, text = sampled.token_id, ""
        reason: FinishReason | None = None
        is_eos = token_id in self._tokenizer.eos_ids
        # With a grammar EOS cannot be ignored: where it is allowed, nothing else may follow.
        ends = token_id in params.stop_token_ids or (is_eos and not (params.ignore_eos and sequence.matcher is None))
        if not ends:
            text = stream.push(token_id)
            if sequence.matcher is not None:
                sequence.matcher.accept(token_id)
        if ends or stream.stopped:
            reason = "stop"
        elif sequence.is_complete(self._max_seq_len):
            reason = "length"
        if sequence.matcher is not None and sequence.matcher.failed:
            reason = "error"
        if reason is not None and not stream.stopped:
            text += stream.finish()
        is_first, scores = sequence.num_generated == 1, sequence.prompt_scores
        return Output(
            request_id=sequence.request.request_id,
            index=sequence.index,
            text=text,
            token_ids=(token_id,),
            logprobs=() if sampled.logprobs is None else (sampled.logprobs,),
            prompt_logprobs=scores.logprobs if is_first and scores else (),
            cached_tokens=(sequence.num_cached or 0) if is_first else 0,
            finish_reason=reason,
        )

    @staticmethod
    def prompt_output(sequence: Sequence) -> Output:
        """The only Output of a request that generates nothing."""
        scores = sequence.prompt_scores
        return Output(
            request_id=sequence.request.request_id,
            prompt_logprobs=scores.logprobs if scores else (),
            prompt_logits=scores.logits if scores else None,
            finish_reason="length",
        )
