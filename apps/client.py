"""Owns the client of an OpenAI-compatible server: a conversation in, a growing reply out, and errors in plain words.

Knows no page, and of the server only what the `openai` client tells: nothing of this project's own packages.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletionChunk

CONNECT_SECONDS = 5
SILENCE_SECONDS = 300  # as long as TorchServe's own responseTimeout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """What the page lets a user choose about a reply."""

    temperature: float
    top_p: float
    max_tokens: int | None  # None: as many as fit


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply so far: its text, and what there is to say about it once it has ended."""

    text: str = ""
    note: str = ""
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Who answers: its name, where it is served, and its context in tokens, if the server says so."""

    name: str
    place: str
    context: int | None

    def __str__(self) -> str:
        return " · ".join([self.name, self.place, *([f"context {self.context:,}"] if self.context else [])])


class NoKeyError(openai.OpenAIError):
    """There is no key file, or no key in it."""


class Server:
    """An OpenAI-compatible server, and the key to it.

    The key is `api_key`, or else the inference key in TorchServe's `key_file`, which is read for each request: keys
    change whenever the server starts.
    """

    def __init__(self, base_url: str, *, api_key: str | None, key_file: Path) -> None:
        self._base_url = base_url
        self._key_file = key_file
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=api_key or self._read_key,
            max_retries=0,
            timeout=openai.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
        )
        self._model: Model | None = None

    async def model(self) -> Model:
        """The served model. `explain` has words for the errors that it raises."""
        if self._model is None:
            listed = (await self._client.models.list()).data[0]
            context = getattr(listed, "max_model_len", None)  # no field of OpenAI's, but of several servers
            self._model = Model(name=listed.id, place=urlsplit(self._base_url).netloc, context=context)
        return self._model

    async def reply(self, messages: Sequence[Mapping[str, str]], sampling: Sampling) -> AsyncGenerator[Reply, None]:
        """The reply, whole each time, as it grows; the last has the note. Never raises: a failure is a note too.

        Closing the generator, or cancelling the task that waits for it, ends the request on the server.
        """
        text = ""
        try:
            chosen = {field: value for field, value in dataclasses.asdict(sampling).items() if value is not None}
            request: Any = {"model": (await self.model()).name, "messages": messages, **chosen}
            pace = Pace()
            async with await self._client.chat.completions.create(
                **request, stream=True, stream_options={"include_usage": True}
            ) as chunks:
                async for chunk in chunks:
                    piece = pace.take(chunk)
                    if piece:
                        text += piece
                        yield Reply(text=text)
        except Exception as error:
            self._model = None  # another one may be served after a restart
            yield Reply(text=text, note=self.explain(error, midway=bool(text)), failed=True)
        else:
            yield Reply(text=text, note=pace.note())

    def explain(self, error: Exception, *, midway: bool = False) -> str:
        """What went wrong, before the reply or midway in it, and what to do: for the person at the page."""
        parts = urlsplit(self._base_url)
        place = f"{parts.scheme}://{parts.netloc}"
        match error:
            case NoKeyError():
                return f"No server of this folder is running. Start one with “make serve”. ({error})"
            case openai.APITimeoutError():
                return f"The server at {place} did not answer in time. Try again in a moment."
            case openai.APIConnectionError() if midway:
                return f"The connection to {place} broke off. The server may have stopped."
            case openai.APIConnectionError():
                return f"No server answers at {place}. Start one with “make serve”, then try again."
            case openai.APIStatusError() if error.status_code in (401, 403) or error.type == "InvalidKeyException":
                return "The server refused the key: it is wrong or has expired. Keys change whenever the server starts."
            case openai.APIStatusError(status_code=404):
                return f"The server at {place} has no such model or address. ({_message(error)})"
            case openai.APIStatusError(status_code=429 | 503):
                return f"The server is busy, or its model is not ready. Try again in a moment. ({_message(error)})"
            case openai.APIStatusError() if error.status_code < 500:
                return f"The server refused this request: {_message(error)}"
            case openai.APIError():
                return f"The server failed: {_message(error)}"
            case _:
                logger.warning("no OpenAI API at %s", self._base_url, exc_info=error)
                return f"What answers at {place} does not speak OpenAI's API."

    async def _read_key(self) -> str:
        try:
            return str(json.loads(self._key_file.read_text(encoding="utf-8"))["inference"]["key"])
        except (OSError, ValueError, KeyError) as error:
            raise NoKeyError(f"there is no key in {self._key_file}") from error


class Pace:
    """How fast one reply comes, from the moment this is made, and how long it is."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._first = self._last = 0.0
        self._prompt_tokens = self._reply_tokens = 0
        self._cut = False

    def take(self, chunk: ChatCompletionChunk) -> str:
        """The text in a chunk of the reply."""
        if chunk.usage:
            self._prompt_tokens, self._reply_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if not chunk.choices:
            return ""
        self._cut = chunk.choices[0].finish_reason == "length"
        text = chunk.choices[0].delta.content or ""
        if text:
            self._last = time.perf_counter()
            self._first = self._first or self._last
        return text

    def note(self) -> str:
        """Time to first token, tokens per second after it, and token counts."""
        facts = []
        if self._first:
            facts.append(f"{self._first - self._begin:.2f} s to first token")
        if self._last > self._first and self._reply_tokens > 1:
            facts.append(f"{(self._reply_tokens - 1) / (self._last - self._first):.1f} tokens/s")
        facts.append(f"{self._prompt_tokens} prompt + {self._reply_tokens} reply tokens")
        if self._cut:
            facts.append("cut at the token limit")
        return " · ".join(facts)


def _message(error: openai.APIError) -> str:
    body = error.body
    return str(body["message"]) if isinstance(body, Mapping) and body.get("message") else error.message
