"""Owns what every reply has around its choices: ids, usage, server-sent events; and replies that need no engine.

Knows no choice from the inside: `completions` and `chat` say how one is written, and `response_events` what a response
is instead.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from handler.call import Progress
from handler.errors import RequestError
from handler.openai.generation import Generation
from llama2.engine.sequence import Grammar, Output, Request

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Immediate:
    """A reply that needs no engine."""

    reply: Any
    stream: bool = False
    content_type: str = "application/json"
    prepare: None = None

    def requests(self, call_id: str) -> list[Request]:
        return []

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        raise AssertionError("nothing was asked of the engine")

    def whole(self, progress: Sequence[Progress]) -> str:
        return to_json(self.reply) + "\n"

    def failure(self, error: RequestError) -> str:
        return error.as_json()


class GenerationFormat(ABC):
    """What all replies have in common that the engine makes."""

    prefix: str  # of the id

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.stream = generation.stream
        self.content_type = "text/event-stream; charset=utf-8" if self.stream else "application/json"
        self.created = int(time.time())
        self.call_id = ""
        self._grammar: Grammar | None = None

    @property
    def reply_id(self) -> str:
        return f"{self.prefix}{self.call_id}"

    @property
    def prepare(self) -> Callable[[], None] | None:
        return None if self.generation.make_grammar is None else self._make_grammar

    def _make_grammar(self) -> None:
        assert self.generation.make_grammar is not None
        self._grammar = self.generation.make_grammar()

    def requests(self, call_id: str) -> list[Request]:
        self.call_id = call_id
        if self.generation.user is not None:
            logger.info("request %s is for user %r", call_id, self.generation.user)
        return [
            self.request(
                request_id=f"{call_id}/{index}",
                prompt_ids=prompt.ids,
                params=self.generation.params,
                grammar=self._grammar,
                adapter=self.generation.adapter,
            )
            for index, prompt in enumerate(self.generation.prompts)
        ]

    @abstractmethod
    def request(self, **common: Any) -> Request:
        """One request to the engine: what both have in `common`, and more."""

    @abstractmethod
    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        """As `Format.chunk`."""

    @abstractmethod
    def whole(self, progress: Sequence[Progress]) -> str:
        """As `Format.whole`."""

    @abstractmethod
    def failure(self, error: RequestError) -> str:
        """As `Format.failure`."""


class ChoicesFormat(GenerationFormat):
    """What completions and chats have in common: a list of choices."""

    kind: str  # of a whole reply
    chunk_kind: str

    @abstractmethod
    def news(self, index: int, news: Output) -> Iterator[dict[str, Any]]:
        """What a stream says of the next news of choice `index`, an event each."""

    @abstractmethod
    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        """Every choice, whole."""

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        return "".join(self._chunk(index, choice, progress) for choice in self.news(index, output))

    def whole(self, progress: Sequence[Progress]) -> str:
        usage = _usage(sum(len(prompt.ids) for prompt in self.generation.prompts), progress)
        if not self.stream:
            choices = [{"index": index, **choice} for index, choice in enumerate(self.choices(progress))]
            return to_json(self._reply(self.kind, choices) | {"usage": usage}) + "\n"
        wants_usage = self.generation.stream_options.include_usage
        last = _event(self._reply(self.chunk_kind, []) | {"usage": usage}) if wants_usage else ""
        return last + DONE

    def failure(self, error: RequestError) -> str:
        return f"data: {error.as_json()}\n{DONE}" if self.stream else error.as_json()

    def _chunk(self, index: int, choice: dict[str, Any], progress: Progress) -> str:
        chunk = self._reply(self.chunk_kind, [{"index": index, **choice}])
        options = self.generation.stream_options
        if options.continuous_usage_stats:
            prompt = self.generation.prompts[index // self.generation.n]
            chunk["usage"] = _usage(len(prompt.ids), [progress])
        elif options.include_usage:
            chunk["usage"] = None
        return _event(chunk)

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.generation.model,
            "system_fingerprint": self.generation.system_fingerprint,
            "choices": choices,
        }


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _event(value: Any) -> str:
    return f"data: {to_json(value)}\n\n"


def _usage(prompt_tokens: int, progress: Sequence[Progress]) -> dict[str, Any]:
    completion_tokens = sum(reply.num_tokens for reply in progress)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(reply.cached_tokens for reply in progress)},
    }
