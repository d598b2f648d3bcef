"""Owns completions: their own fields, and how a reply is asked of the engine and written.

That is echo, four lists of log-probabilities, and best_of. Knows no other endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field, Tag

from handler.call import Format, Progress
from handler.openai.constraints import Calls
from handler.openai.fields import TokenId, by_kind, only, parse
from handler.openai.generation import MAX_N, ChoicesBody, Generation, Model
from handler.openai.inspector import Inspector, inspected
from handler.openai.logprobs import CompletionLogprobs
from handler.openai.replies import ChoicesFormat
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.errors import InvalidValue

DEFAULT_MAX_TOKENS = 16

Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[list[TokenId], Tag("ids")]
    | Annotated[list[list[TokenId]], Tag("lists")],
    by_kind("a string, a list of strings, a list of token ids or a list of such lists"),
]


class CompletionBody(ChoicesBody):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool = False
    logprobs: Any = None  # checked by `SamplingParams`
    suffix: Annotated[Any, only(why="this model was not trained to fill a gap")] = None


def read(model: Model, raw: Any) -> Format:
    """What a body asks for.

    Raises:
        InvalidValue, RequestError: a field is wrong.
    """
    body = parse(CompletionBody, raw)
    sampled = body.n if body.best_of is None else body.best_of
    if sampled < body.n:
        raise InvalidValue("best_of", f"must be at least n={body.n}, got {sampled}")
    if body.stream and sampled > body.n:
        raise InvalidValue("best_of", "greater than n cannot be streamed: the best are known at the end")
    if body.max_tokens == 0 and sampled > 1:
        raise InvalidValue("best_of" if body.best_of else "n", f"must be 1 with max_tokens=0, got {sampled}")
    encoded = model.prompts.completion(body.prompt, is_cut=body.is_cut)
    generation = model.generation(
        body,
        encoded,
        n=sampled,
        max_tokens=body.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=0 if body.logprobs is None and sampled > body.n else body.logprobs,
        user=body.user,
        make_grammar=body.grammar_maker(model.grammars, calls=Calls(), never_ends=body.never_ends),
        stream_options=body.options(),
    )
    if body.dry_run:
        inspector = Inspector(model)
        pairs = zip(generation.prompts, encoded, strict=True)
        return inspected(generation.model, [inspector.text(prompt, one.ids) for prompt, one in pairs])
    return CompletionFormat(model, generation, body)


class CompletionFormat(ChoicesFormat):
    """The replies to one body. `generation.n` is the number that is sampled, of which `n` are shown."""

    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: Model, generation: Generation, body: CompletionBody) -> None:
        super().__init__(generation)
        self._model = model
        self._body = body
        self._writers: dict[int, CompletionLogprobs] = {}  # of the choices that have begun
        self._prompt_logprobs: dict[int, Sequence[TokenLogprobs | None]] = {}

    def request(self, **common: Any) -> Request:
        return Request(
            **common,
            prompt_logprobs=self._body.logprobs if self._body.echo else None,
            generate=self._body.max_tokens != 0,
        )

    def news(self, index: int, news: Output) -> Iterator[dict[str, Any]]:
        number = index // self.generation.n
        if news.prompt_logprobs:  # they come once, before any other reply to this prompt begins
            self._prompt_logprobs[number] = news.prompt_logprobs
        choice = self._choice(index, number, news)
        if choice["text"] or choice["logprobs"] or choice["finish_reason"]:
            yield choice

    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = []
        for number in range(len(self.generation.prompts)):
            replies = progress[number * self.generation.n : (number + 1) * self.generation.n]
            self._prompt_logprobs[number] = replies[0].prompt_logprobs
            if len(replies) > self._body.n:
                replies = sorted(replies, key=_mean_logprob, reverse=True)[: self._body.n]
            shown += [self._choice(len(shown) + place, number, reply) for place, reply in enumerate(replies)]
        return shown

    def _choice(self, index: int, number: int, news: Output | Progress) -> dict[str, Any]:
        """All of choice `index`, or what is new of it. With echo, the first news include prompt `number`."""
        text, token_ids = news.text, news.token_ids
        entries: Sequence[TokenLogprobs | None] = news.logprobs
        if index not in self._writers:
            tokenizer, echo = self._model.tokenizer, self._body.echo
            self._writers[index] = CompletionLogprobs(self._model.token_names, tokenizer, starts_text=echo)
            if echo:
                prompt_ids = self.generation.prompts[number].ids
                text = tokenizer.decode(prompt_ids) + text
                token_ids = [*prompt_ids, *token_ids]
                entries = [*self._prompt_logprobs.get(number, ()), *entries]
        has_logprobs = self._body.logprobs is not None and bool(token_ids)
        return {
            "text": text,
            "logprobs": self._writers[index].write(token_ids, entries) if has_logprobs else None,
            "finish_reason": news.finish_reason,
        }


def _mean_logprob(reply: Progress) -> float:
    return sum(entry.logprob for entry in reply.logprobs) / max(len(reply.logprobs), 1)
