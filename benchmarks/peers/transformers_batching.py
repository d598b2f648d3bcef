"""A peer: transformers' own continuous batching (`generate_batch`), run by our own interpreter.

Its manager is kept from one piece of work to the next. Times are those that it records at each token, so
that neither its thread's start nor its cache's allocation counts.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, __version__
from transformers.generation.continuous_batching.requests import GenerationOutput

from benchmarks.peers.protocol import Done, Setup, Work, serve
from benchmarks.peers.transformers import load_model


class TransformersBatching:
    version = __version__

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._model: Any = load_model(setup)
        # Prompts are seen twice, and computed twice.
        self._batching = ContinuousBatchingConfig(allow_block_sharing=False, max_requests_per_batch=setup.max_batch)
        self._shape = (0, 0)

    def run(self, work: Work) -> Done:
        shape = (len(work.prompts), len(work.prompts[0]))
        if shape != self._shape:
            self._shape = shape
            self._model.destroy_cached_continuous_batching_manager()  # it was sized for other work
            self._generate(work, self._tokens(work))
        return self._run(work)

    def _run(self, work: Work) -> Done:
        """First the prompts alone, each with its first token. Then again, timed once all of them decode."""
        prompts = self._generate(work, 1)
        replies = self._generate(work, self._tokens(work))
        last = max(replies, key=lambda reply: _times(reply)[0])
        return Done(
            prefill_seconds=max(_times(reply)[0] for reply in prompts) - min(reply.created_time for reply in prompts),
            decode_seconds=_times(last)[work.new_tokens] - _times(last)[0],
            token_ids=[reply.generated_tokens[: work.new_tokens + 1] for reply in replies],
        )

    @staticmethod
    def _tokens(work: Work) -> int:
        """While later prompts are computed, earlier ones decode already: there must be enough left to decode."""
        return work.new_tokens + 1 + len(work.prompts)

    def _generate(self, work: Work, max_new_tokens: int) -> list[GenerationOutput]:
        replies = self._model.generate_batch(
            work.prompts,
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=max_new_tokens),
            continuous_batching_config=self._batching,
            max_new_tokens=max_new_tokens,
            record_timestamps=True,
            persistent_manager=True,
        )
        if failed := [reply.error for reply in replies.values() if reply.error is not None]:
            raise RuntimeError(failed[0])
        if len(replies) < len(work.prompts):
            raise RuntimeError(f"{len(replies)} of {len(work.prompts)} replies came")
        return list(replies.values())


def _times(reply: GenerationOutput) -> list[float]:
    assert reply.timestamps is not None
    return reply.timestamps


if __name__ == "__main__":
    serve(TransformersBatching)
