"""Owns the traffic between TorchServe's polls and the engine: who is live, what is news, who has left.

TorchServe calls again and again with all live requests (`continuousBatching`). New ids are submitted, missing ids are
clients that left, and what the engine has ready within `POLL_SECONDS` goes back: for each request a piece of its reply
and a criterion, False for "more to come", True for "this was the last piece", None for "a whole reply, nothing was sent
before". Only that last kind can carry a status, so a body is judged before its first reply. Accepted requests get an
empty first piece: from then on TorchServe notices when their client leaves.

Knows no API's fields, and of the engine no more than add, abort and poll.
"""

from __future__ import annotations

import http
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from handler.body import RequestError, read_body
from handler.call import Call, Format
from llama2.engine.sequence import Output, Request

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.01
# TorchServe calls again within milliseconds while anybody is live, and not at all once the last client has left.
SILENCE_SECONDS = 1.5


class Generator(Protocol):
    """What is needed of the engine; all three are thread-safe."""

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def poll(self, timeout: float) -> list[Output]: ...


class Transport:
    """The live calls of one worker. `read` turns a body into a call's format, or raises RequestError."""

    def __init__(self, engine: Generator, read: Callable[[dict[str, Any] | str], Format]) -> None:
        self._engine = engine
        self._read = read
        self._calls: dict[str, Call] = {}
        self._lock = threading.Lock()
        self._last_poll = time.monotonic()

    def poll(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One exchange. `context` is TorchServe's: request ids and headers in, statuses and criteria out."""
        with self._lock:
            call_ids: list[str] = [context.get_request_id(index) for index in range(len(data))]
            for call_id in set(self._calls).difference(call_ids):
                self._abort(self._calls.pop(call_id))
            refusals: dict[int, RequestError] = {}
            for index, call_id in enumerate(call_ids):
                if call_id not in self._calls:
                    try:
                        self._accept(call_id, index, data[index], context)
                    except Exception as error:
                        refusals[index] = _as_request_error(error)
            for output in self._engine.poll(0 if refusals else POLL_SECONDS):
                call = self._calls.get(output.request_id.rpartition("/")[0])
                if call is not None:
                    call.take(output)
            replies = [self._reply(index, call_ids[index], refusals.get(index), context) for index in range(len(data))]
            self._last_poll = time.monotonic()
        context.stopping_criteria = [_always(criterion) for _, criterion in replies]
        return [text for text, _ in replies]

    def abort_if_silent(self) -> None:
        """To be called now and then: stop working for clients that nobody asks for any more."""
        with self._lock:
            if time.monotonic() - self._last_poll > SILENCE_SECONDS:
                for call in self._calls.values():
                    self._abort(call)

    def _abort(self, call: Call) -> None:
        if not call.abandoned:
            logger.info("request %s is aborted: its client has left", call.call_id)
            call.abandoned = True
            for request in call.requests:
                self._engine.abort(request.request_id)

    def _accept(self, call_id: str, index: int, item: dict[str, Any], context: Any) -> None:
        if path := context.get_request_header(index, "url_path"):
            raise RequestError(f"there is nothing at {path!r}", status=404)
        part = context.get_request_header(index, "body")  # of the body's part, unless a client's header has that name
        is_json = isinstance(part, dict) and part.get("content-type", "").startswith("application/json")
        form = self._read(read_body(item, is_json=is_json))
        call = Call(call_id, form)
        try:
            for request in call.requests:
                self._engine.add(request)
        except ValueError as error:
            for request in call.requests:
                self._engine.abort(request.request_id)
            raise RequestError(str(error)) from None
        self._calls[call_id] = call

    def _reply(self, index: int, call_id: str, refusal: RequestError | None, context: Any) -> tuple[str, bool | None]:
        """What goes back for one live request, and its criterion."""
        call = self._calls.get(call_id)
        started = call is not None and call.started
        if call is not None and call.abandoned:
            refusal = RequestError("the server was held up and gave this request up", status=503)
        if refusal is not None:
            status, content_type = refusal.status, "application/json"
            text, last = refusal.as_json(), True
        else:
            assert call is not None
            status, content_type = 200, call.form.content_type
            text, last = call.unsent(), call.finished
            call.started = True
        if last:
            self._calls.pop(call_id, None)
        if not started:
            context.set_response_status(status, http.HTTPStatus(status).phrase, index)
            context.set_response_content_type(index, content_type)
        return text, (True if started else None) if last else False


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    logger.error("a request could not be read", exc_info=error)
    return RequestError("the server failed to read this request; its log says why", status=500)


def _always(criterion: bool | None) -> Callable[[Any], bool | None]:
    return lambda _reply: criterion
