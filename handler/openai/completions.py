"""Owns how a completion is asked of the engine and written: echo, its four lists of log-probabilities, best_of.

Knows no prompt's origin and no HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from handler.call import Progress
from handler.openai.logprobs import CompletionLogprobs, TokenNames
from handler.openai.responses import Generation, GenerationFormat
from handler.openai.schema import CompletionBody
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.text.tokenizer import Tokenizer


class CompletionFormat(GenerationFormat):
    """The replies to one body. `generation.n` is the number that is sampled, of which `n` are shown."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, generation: Generation, body: CompletionBody, tokenizer: Tokenizer) -> None:
        super().__init__(generation)
        self._body = body
        self._tokenizer = tokenizer
        self._names = TokenNames(tokenizer)
        self._writers: dict[int, CompletionLogprobs] = {}  # of the choices whose stream has begun
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}

    def request(self, **common: Any) -> Request:
        return Request(
            **common,
            prompt_logprobs=self._body.logprobs if self._body.echo else None,
            generate=self._body.max_tokens != 0,
        )

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        number = index // self.generation.n
        if output.prompt_logprobs:  # they come once, before any other reply to this prompt begins
            self._prompt_logprobs[number] = output.prompt_logprobs
        news = Progress()
        news.take(output)
        choice = self._choice(index, number, news, self._prompt_logprobs.get(number, ()))
        if not (choice["text"] or choice["logprobs"] or choice["finish_reason"]):
            return ""
        return self.event(index, choice, progress)

    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        sampled, wanted = self.generation.n, self._body.n or 1
        for number in range(len(self.generation.prompts)):
            replies = progress[number * sampled : (number + 1) * sampled]
            prompt_logprobs = replies[0].prompt_logprobs
            if sampled > wanted:
                replies = sorted(replies, key=_mean_logprob, reverse=True)[:wanted]
            for reply in replies:
                index = len(shown)
                shown.append({"index": index, **self._choice(index, number, reply, prompt_logprobs)})
        return shown

    def _choice(
        self, index: int, number: int, news: Progress, prompt_logprobs: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any]:
        """All of a choice but its index, or what is new of it. With echo, the first news include prompt `number`."""
        echo = bool(self._body.echo) and index not in self._writers
        writer = self._writers.setdefault(
            index, CompletionLogprobs(self._names, self._tokenizer, starts_text=bool(self._body.echo))
        )
        text, token_ids = news.text, news.token_ids
        entries: Sequence[TokenLogprobs | None] = news.logprobs
        if echo:
            prompt = self.generation.prompts[number]
            text = self._tokenizer.decode(prompt.ids) + text
            token_ids, entries = [*prompt.ids, *token_ids], [*prompt_logprobs, *entries]
        has_logprobs = self._body.logprobs is not None and bool(token_ids)
        return {
            "text": text,
            "logprobs": writer.write(token_ids, entries) if has_logprobs else None,
            "finish_reason": news.finish_reason,
        }


def _mean_logprob(reply: Progress) -> float:
    return sum(entry.logprob for entry in reply.logprobs) / max(len(reply.logprobs), 1)
