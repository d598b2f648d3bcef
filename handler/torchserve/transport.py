"""Owns the traffic between TorchServe's polls and the engine: who is live, what is news, who has left.

TorchServe calls again and again with all live requests (`continuousBatching`). New ids are submitted, missing ids are
clients that left, and what the engine has ready within a moment goes back: for each request a piece of its reply
and a criterion, False for "more to come", True for "this was the last piece", None for "a whole reply, nothing was sent
before". Only that last kind can carry a status, so a body is judged before its first reply. Accepted requests get an
empty first piece: from then on TorchServe notices when their client leaves.

Knows no API's fields, and of the engine no more than add, abort and poll.
"""

from __future__ import annotations

import concurrent.futures
import http
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from handler.body import read_body
from handler.call import Call, Format
from handler.errors import RequestError
from llama2.engine.sequence import Output, Request

logger = logging.getLogger(__name__)

# How long a poll waits for the engine's news: at least so many seconds, and while nobody is new for so much of the time
# that passed between the last two. A poll takes time from the engine, on every rank, and whoever comes meanwhile could
# not begin before its step ends.
POLL_SECONDS = 0.01
PART_OF_STEP = 0.8
LONGEST_STEP_SECONDS = 0.25
# How long everybody waits for what a new call needs first: an error that comes later has no status of its own.
PREPARE_SECONDS = 0.05
# TorchServe calls again within milliseconds while anybody is live, and not at all once the last client has left. After
# so many looks without a call the engine gives its memory back and waits: looks, and not seconds, since on a machine
# that is short of processors they come as late as the calls do. After so many seconds nobody is expected any more.
QUIET_LOOKS = 4
SILENCE_SECONDS = 1.5
# One call may ask for many replies, so TorchServe's own limit on calls does not bound what waits in the engine.
MAX_REPLIES = 4096


class Generator(Protocol):
    """What is needed of the engine; all of it is thread-safe."""

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def poll(self, timeout: float) -> list[Output]: ...

    def suspend(self) -> None: ...

    def resume(self) -> None: ...


# All that is behind the model's own path, and the way to the body, which not every path needs.
Read = Callable[[str, Callable[[], dict[str, Any] | str]], Format]


class Transport:
    """The live calls of one worker. `read` turns a path and a body into a call's format, or raises RequestError."""

    def __init__(self, engine: Generator, read: Read) -> None:
        self._engine = engine
        self._read = read
        self._preparing: dict[str, tuple[Format, Future[None]]] = {}
        self._calls: dict[str, Call] = {}
        self._started: set[str] = set()  # those whose status line is out, so that no other can follow
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self._lock = threading.Lock()
        self._last_poll = time.monotonic()
        self._looks = 0  # since then
        self._last_news = time.monotonic()
        self._step_seconds = 0.0  # from the news before these, if that was a step's time

    def poll(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One exchange. `context` is TorchServe's: request ids and headers in, statuses and criteria out."""
        with self._lock:
            self._engine.resume()
            call_ids: list[str] = [context.get_request_id(index) for index in range(len(data))]
            self._forget_all_but(set(call_ids))
            refusals: dict[str, RequestError] = {}
            for index, call_id in enumerate(call_ids):
                if call_id not in self._calls and call_id not in self._preparing:
                    try:
                        self._accept(call_id, index, data[index], context)
                    except Exception as error:
                        refusals[call_id] = _as_request_error(error)
            failures = self._begin_prepared()
            is_new = self._preparing or any(call_id not in self._started for call_id in call_ids)
            patience = 0 if refusals or failures else POLL_SECONDS if is_new else self._patience()
            outputs = self._engine.poll(patience)
            if outputs:
                self._note_news()
            for output in outputs:
                self._take(output)
            replies = [
                _refusal(index, refusals[call_id], context)
                if call_id in refusals
                else self._reply(index, call_id, failures.get(call_id), context)
                for index, call_id in enumerate(call_ids)
            ]
            self._last_poll = time.monotonic()
            self._looks = 0
        context.stopping_criteria = [_always(criterion) for _, criterion in replies]
        return [text for text, _ in replies]

    def watch(self) -> None:
        """A look, to be taken every 10 ms or so: stop working for clients that nobody asks for any more."""
        with self._lock:
            self._looks += 1
            if self._calls and self._looks == QUIET_LOOKS:
                self._engine.suspend()
            if time.monotonic() - self._last_poll > SILENCE_SECONDS:
                for call in self._calls.values():
                    self._leave(call)

    # ---- the engine's rhythm ----

    def _note_news(self) -> None:
        seconds = time.monotonic() - self._last_news
        self._last_news += seconds
        self._step_seconds = seconds if seconds <= LONGEST_STEP_SECONDS else 0.0

    def _patience(self) -> float:
        """Until shortly before the next news, if they take as long as the last: then there is a poll for who came."""
        return max(POLL_SECONDS, self._last_news + PART_OF_STEP * self._step_seconds - time.monotonic())

    # ---- one call ----

    def _accept(self, call_id: str, index: int, item: dict[str, Any], context: Any) -> None:
        path = context.get_request_header(index, "url_path") or ""
        part = context.get_request_header(index, "body")  # of the body's part, unless a client's header has that name
        is_json = isinstance(part, dict) and part.get("content-type", "").startswith("application/json")
        form = self._read(path, lambda: read_body(item, is_json=is_json))
        if form.prepare is None:
            self._begin(Call(call_id, form))
        else:
            self._preparing[call_id] = (form, self._pool.submit(form.prepare))

    def _begin_prepared(self) -> dict[str, tuple[Format, RequestError]]:
        """Begin the calls that have become ready, and return those that turned out to be impossible. New ones are
        waited for, so that most of these can still have a status of their own; the others have said 200 by then."""
        new = [future for call_id, (_, future) in self._preparing.items() if call_id not in self._started]
        concurrent.futures.wait(new, timeout=PREPARE_SECONDS)
        failures: dict[str, tuple[Format, RequestError]] = {}
        for call_id, (form, future) in list(self._preparing.items()):
            if future.done():
                del self._preparing[call_id]
                try:
                    future.result()
                    self._begin(Call(call_id, form))
                except Exception as error:
                    failures[call_id] = form, _as_request_error(error)
        return failures

    def _begin(self, call: Call) -> None:
        live = sum(other.num_replies for other in self._calls.values())
        if live and live + call.num_replies > MAX_REPLIES:
            raise RequestError(
                f"the server has {live} replies to make and takes at most {MAX_REPLIES}: try again later",
                status=429,
                code="rate_limit_exceeded",
            )
        try:
            for request in call.requests:
                self._engine.add(request)
        except ValueError as error:
            for request in call.requests:
                self._engine.abort(request.request_id)
            raise RequestError.of(error) from None
        self._calls[call.call_id] = call

    def _take(self, output: Output) -> None:
        call = self._calls.get(output.request_id.rpartition("/")[0])
        if call is not None and call.failure is None:
            try:
                call.take(output)
            except Exception as error:
                self._fail(call, _as_request_error(error))

    def _leave(self, call: Call) -> None:
        if call.failure is None:
            logger.info("request %s is aborted: its client has left", call.call_id)
            self._fail(call, RequestError("the server was held up and gave this request up", status=503))

    def _fail(self, call: Call, failure: RequestError) -> None:
        """Nothing will come of this call any more."""
        call.failure = failure
        for request in call.requests:
            self._engine.abort(request.request_id)

    def _forget_all_but(self, live: set[str]) -> None:
        for call_id in self._calls.keys() - live:
            self._leave(self._calls.pop(call_id))
        for call_id in self._preparing.keys() - live:
            self._preparing.pop(call_id)[1].cancel()
        self._started &= live

    def _reply(
        self, index: int, call_id: str, failed: tuple[Format, RequestError] | None, context: Any
    ) -> tuple[str, bool | None]:
        """What goes back for one live call, and its criterion."""
        text, last = "", False
        if failed is not None:
            form, failure = failed
            text, last = form.failure(failure), True
        elif call_id in self._preparing:
            form, failure = self._preparing[call_id][0], None
        else:
            call = self._calls[call_id]
            text, last = self._unsent(call)
            form, failure = call.form, call.failure
        if last:
            self._calls.pop(call_id, None)
        if call_id in self._started:
            return text, last
        if failure is not None:
            return _refusal(index, failure, context)
        self._started.add(call_id)
        _set_head(context, index, 200, form.content_type)
        return text, None if last else False

    def _unsent(self, call: Call) -> tuple[str, bool]:
        """What can be sent of a call, and whether that is the last of it."""
        if call.failure is None:
            try:
                return call.unsent(), call.finished
            except Exception as error:
                self._fail(call, _as_request_error(error))
        assert call.failure is not None
        return call.form.failure(call.failure), True


def _refusal(index: int, error: RequestError, context: Any) -> tuple[str, None]:
    _set_head(context, index, error.status, "application/json")
    return error.as_json(), None


def _set_head(context: Any, index: int, status: int, content_type: str) -> None:
    context.set_response_status(status, http.HTTPStatus(status).phrase, index)
    context.set_response_content_type(index, content_type)


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    logger.error("a request has met a fault of the server", exc_info=error)
    return RequestError("the server failed on this request; its log says why", status=500)


def _always(criterion: bool | None) -> Callable[[Any], bool | None]:
    return lambda _reply: criterion
