"""Owns the state of one HTTP call, which may be several requests to the engine, from acceptance to its last byte.

Knows neither TorchServe nor any API's fields: how a reply is written is its `Format`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llama2.engine.sequence import FinishReason, Output, Request, TokenLogprobs


@dataclass(slots=True, kw_only=True)
class Progress:
    """What one prompt of a call has been answered so far."""

    text: str = ""
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, output: Output) -> None:
        self.text += output.text
        self.num_tokens += len(output.token_ids)
        self.logprobs += output.logprobs
        self.finish_reason = output.finish_reason


class Format(Protocol):
    """How one API writes the replies to one call."""

    @property
    def stream(self) -> bool: ...

    @property
    def content_type(self) -> str: ...

    def requests(self, call_id: str) -> list[Request]:
        """What the engine shall do; the id of each request starts with `call_id`."""

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        """What a stream says about news of prompt `index`; `progress` holds them already. May be empty."""

    def whole(self, progress: Sequence[Progress]) -> str:
        """The reply that is not streamed, when every prompt is answered; or the end of a stream."""


class Call:
    """One HTTP call. `started`: its status line is out, so that no other can follow. `abandoned`: its requests were
    aborted, and nothing will come of them."""

    def __init__(self, call_id: str, form: Format) -> None:
        self.call_id = call_id
        self.form = form
        self.requests = form.requests(call_id)
        self.started = False
        self.abandoned = False
        self._progress = {request.request_id: Progress() for request in self.requests}
        self._index = {request.request_id: index for index, request in enumerate(self.requests)}
        self._unsent: list[str] = []

    @property
    def finished(self) -> bool:
        return all(progress.finish_reason for progress in self._progress.values())

    def take(self, output: Output) -> None:
        progress = self._progress[output.request_id]
        progress.take(output)
        if self.form.stream:
            self._unsent.append(self.form.chunk(self._index[output.request_id], output, progress))

    def unsent(self) -> str:
        """What can be sent now and has not been; a call that is not streamed has all of it at its end."""
        if self.finished:
            self._unsent.append(self.form.whole(list(self._progress.values())))
        text = "".join(self._unsent)
        self._unsent.clear()
        return text
