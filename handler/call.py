"""Owns the life of one HTTP call, which may be several requests to the engine, from acceptance to its last byte.

Knows no front and no API's fields: a call's `Format` writes its reply.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from handler.errors import RequestError
from llama2.engine.sequence import Errand, FinishReason, Output, Request, TokenLogprobs

_LEFT_GRAMMAR = "the reply could not be held to its grammar, which is too ambiguous, or not in this model's vocabulary"


@dataclass(slots=True, kw_only=True)
class Progress:
    """One reply so far. `prompt_logprobs` and `cached_tokens` are with the first reply to a prompt alone."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def take(self, output: Output) -> None:
        if output.problem:
            raise RequestError(f"the adapter cannot be had: {output.problem}", code="invalid_adapter")
        if output.finish_reason == "error":
            raise RequestError(_LEFT_GRAMMAR, code="invalid_value")
        self.text += output.text
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.cached_tokens += output.cached_tokens
        self.finish_reason = output.finish_reason


class Format(Protocol):
    """How one API writes the replies to one call."""

    @property
    def stream(self) -> bool: ...

    @property
    def content_type(self) -> str: ...

    @property
    def prepare(self) -> Callable[[], None] | None:
        """What must be done before `requests`, if anything. It may raise RequestError."""

    def requests(self, call_id: str) -> Sequence[Request | Errand]:
        """What the engine is to do; the id of each request starts with `call_id`."""

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        """What a stream says about news of reply `index`; `progress` holds them already. May be empty.

        Replies are counted through: all of the first request, then all of the second.
        """

    def whole(self, progress: Sequence[Progress]) -> str:
        """The body that is not streamed, when every reply is complete; or the end of a stream."""

    def failure(self, error: RequestError) -> str:
        """The end of a call that failed when its status line was out already."""


class State(enum.Enum):
    PREPARING = "preparing"
    LOADING = "loading"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a reply, which may be empty. Status and content type go out before the first, and hold for all."""

    text: str
    is_first: bool
    is_last: bool
    status: int
    content_type: str


class Call:
    """One HTTP call: it takes what the engine makes for it, and gives what can be sent. Any thread may do either.

    It is prepared, runs from `begin` on, and has ended when every reply is complete or `fail` says why none will be.
    While it is prepared there is no `piece`, nor while its adapter may have to be loaded, until the engine has first
    said something of it: its status is not known.
    """

    def __init__(self, call_id: str, *, on_news: Callable[[], None] = lambda: None) -> None:
        """`on_news` is called, by whichever thread, when the state changes or there may be more to send."""
        self.call_id = call_id
        self.state = State.PREPARING
        self.is_new = True  # no piece of it was sent
        self.requests: Sequence[Request | Errand] = ()
        self._form: Format
        self._on_news = on_news
        self._error: RequestError | None = None
        self._position: dict[tuple[str, int], int] = {}
        self._progress: list[Progress] = []
        self._unsent: list[str] = []
        self._changed = threading.Condition()

    @property
    def num_replies(self) -> int:
        return len(self._progress)

    @property
    def has_status(self) -> bool:
        """Is there a `piece`?"""
        return self.state in (State.RUNNING, State.ENDED)

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    def begin(self, form: Format) -> Sequence[Request | Errand]:
        """What the engine shall do; nothing, if the call needs no engine or has failed. `form` is prepared."""
        with self._changed:
            if not self.ended:
                self._form = form
                self.requests = form.requests(self.call_id)
                replies = [(request.request_id, index) for request in self.requests for index in range(request.n)]
                self._position = {reply: position for position, reply in enumerate(replies)}
                self._progress = [Progress() for _ in replies]
                self._update(State.LOADING if any(one.adapter for one in self.requests) else State.RUNNING)
            return self.requests

    def take(self, output: Output) -> None:
        """News of one reply."""
        with self._changed:
            if self.state in (State.LOADING, State.RUNNING):
                position = self._position[output.request_id, output.index]
                progress = self._progress[position]
                progress.take(output)
                if self._form.stream:
                    self._unsent.append(self._form.chunk(position, output, progress))
                self._update(State.RUNNING)

    def fail(self, error: RequestError) -> None:
        """Nothing more will come of this call; `error` says why. After its end nothing happens."""
        with self._changed:
            if not self.ended:
                self._error = error
                self._update(State.ENDED)

    def piece(self) -> Piece:
        """What can be sent now and has not been; a call that is not streamed has all of it at its end."""
        with self._changed:
            assert self.has_status
            is_first, self.is_new = self.is_new, False
            if self._error is not None and is_first:
                text, status, content_type = self._error.as_json(), self._error.status, "application/json"
            else:
                text = "".join(self._unsent) if self._error is None else self._form.failure(self._error)
                status, content_type = 200, self._form.content_type
            self._unsent.clear()
            return Piece(text=text, is_first=is_first, is_last=self.ended, status=status, content_type=content_type)

    def wait_until_prepared(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.state is not State.PREPARING, timeout)

    def _update(self, state: State) -> None:
        if state is State.RUNNING and all(one.finish_reason for one in self._progress):
            self._unsent.append(self._form.whole(self._progress))
            state = State.ENDED
        self.state = state
        self._changed.notify_all()
        self._on_news()
