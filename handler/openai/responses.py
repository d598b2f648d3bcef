"""Owns what every reply of the OpenAI API has around its choices: ids, usage, server-sent events.

Knows no choice from the inside: `completions` and `chat` say how one is written.
"""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from handler.call import Progress
from handler.errors import RequestError
from handler.openai.schema import GenerationBody
from handler.prompt import Prompt
from llama2.engine.sequence import Grammar, Output, Request, SamplingParams

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One accepted body: what to generate, and how to name its reply. `n` replies are made of each prompt."""

    body: GenerationBody
    model: str
    system_fingerprint: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int
    make_grammar: Callable[[], Grammar] | None = None
    user: str | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)


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
    """What completions and chats have in common."""

    prefix: str  # of the id
    kind: str  # of a whole reply
    chunk_kind: str

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.stream = bool(generation.body.stream)
        self._created = int(time.time())
        self._id = self.prefix
        self._grammar: Grammar | None = None

    @property
    def content_type(self) -> str:
        return "text/event-stream; charset=utf-8" if self.stream else "application/json"

    @property
    def prepare(self) -> Callable[[], None] | None:
        return None if self.generation.make_grammar is None else self._make_grammar

    def _make_grammar(self) -> None:
        assert self.generation.make_grammar is not None
        self._grammar = self.generation.make_grammar()

    def requests(self, call_id: str) -> list[Request]:
        self._id = f"{self.prefix}-{call_id}"
        if self.generation.user is not None:
            logger.info("request %s is for user %r", call_id, self.generation.user)
        return [
            self.request(
                request_id=f"{call_id}/{index}",
                prompt_ids=prompt.ids,
                params=self.generation.params,
                n=self.generation.n,
                grammar=self._grammar,
            )
            for index, prompt in enumerate(self.generation.prompts)
        ]

    @abstractmethod
    def request(self, **common: Any) -> Request:
        """One request to the engine: what both have in `common`, and more."""

    @abstractmethod
    def chunk(self, index: int, output: Output, progress: Progress) -> str: ...

    @abstractmethod
    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        """Every choice, whole."""

    def whole(self, progress: Sequence[Progress]) -> str:
        usage = _usage(self.generation.num_prompt_tokens, progress)
        if not self.stream:
            return to_json(self._reply(self.kind, self.choices(progress)) | {"usage": usage}) + "\n"
        last = _event(self._reply(self.chunk_kind, []) | {"usage": usage}) if self._includes_usage else ""
        return last + DONE

    def failure(self, error: RequestError) -> str:
        return f"data: {error.as_json()}\n{DONE}" if self.stream else error.as_json()

    def event(self, index: int, choice: dict[str, Any], progress: Progress) -> str:
        """One chunk of choice `index`."""
        chunk = self._reply(self.chunk_kind, [{"index": index, **choice}])
        if self._includes_usage:
            chunk["usage"] = None
        options = self.generation.body.stream_options
        if options is not None and options.continuous_usage_stats:
            prompt = self.generation.prompts[index // self.generation.n]
            chunk["usage"] = _usage(len(prompt.ids), [progress])
        return _event(chunk)

    @property
    def _includes_usage(self) -> bool:
        options = self.generation.body.stream_options
        return options is not None and bool(options.include_usage)

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
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
