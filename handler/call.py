"""Owns the state of one HTTP call, which may be several requests to the engine, from acceptance to its last byte.

Knows neither TorchServe nor any API's fields: how a reply is written is its `Format`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from handler.errors import RequestError
from llama2.engine.sequence import FinishReason, Output, Request, TokenLogprobs


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
        """What must be done before `requests`, where that may take long. It runs in a thread, and may raise
        RequestError."""

    def requests(self, call_id: str) -> list[Request]:
        """What the engine shall do; the id of each request starts with `call_id`."""

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        """What a stream says about news of reply `index`; `progress` holds them already. May be empty.

        Replies are counted through: all of the first request, then all of the second.
        """

    def whole(self, progress: Sequence[Progress]) -> str:
        """The body that is not streamed, when every reply is complete; or the end of a stream."""

    def failure(self, error: RequestError) -> str:
        """The end of a call that failed when its status line was out already."""


class Call:
    """One HTTP call. `failure`: its requests were aborted for this reason, and nothing will come of them."""

    def __init__(self, call_id: str, form: Format) -> None:
        self.call_id = call_id
        self.form = form
        self.requests = form.requests(call_id)
        self.failure: RequestError | None = None
        replies = [(request.request_id, index) for request in self.requests for index in range(request.n)]
        self._position = {reply: position for position, reply in enumerate(replies)}
        self._progress = [Progress() for _ in replies]
        self._unsent: list[str] = []

    @property
    def num_replies(self) -> int:
        return len(self._progress)

    @property
    def finished(self) -> bool:
        return all(progress.finish_reason for progress in self._progress)

    def take(self, output: Output) -> None:
        position = self._position[output.request_id, output.index]
        progress = self._progress[position]
        progress.take(output)
        if self.form.stream:
            self._unsent.append(self.form.chunk(position, output, progress))

    def unsent(self) -> str:
        """What can be sent now and has not been; a call that is not streamed has all of it at its end."""
        if self.finished:
            self._unsent.append(self.form.whole(self._progress))
        text = "".join(self._unsent)
        self._unsent.clear()
        return text
