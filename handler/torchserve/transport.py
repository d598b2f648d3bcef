"""Owns the traffic between TorchServe's polls and the service: who is live, what is news, who has left.

TorchServe calls again and again with all live requests (`continuousBatching`). A new id opens a call, a missing id is a
client that left, and what there is within a moment goes back: for each request a piece of its reply and a criterion,
False for "more to come", True for "this was the last piece", None for "a whole reply, nothing was sent
before". Only that last kind can carry a status of its own, so a body is judged before its first reply. Accepted
requests get an empty first piece: from then on TorchServe notices when their client leaves.

Knows no API's fields, and nothing behind the service.
"""

from __future__ import annotations

import http
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from handler.call import Call, Piece, State
from handler.errors import RequestError

if TYPE_CHECKING:
    from handler.service import Service

logger = logging.getLogger(__name__)

# How long a poll waits for the engine's news: at least so many seconds and, while nobody is new, this part of the time
# between the last two. A poll takes time from the engine, on every rank, and whoever comes meanwhile could not begin
# before its step ends.
POLL_SECONDS = 0.01
PART_OF_STEP = 0.8
LONGEST_STEP_SECONDS = 0.25
# How long a poll waits for calls that are being prepared, while others are live and while nobody is. TorchServe sends
# their bodies again with every poll until they have a reply.
PREPARE_SECONDS = 0.02
ALONE_SECONDS = 0.25
# TorchServe calls again within milliseconds while anybody is live, and not at all once the last client has left. After
# so many looks without a call the engine gives its memory back and waits: looks, and not seconds, since on a machine
# that is short of processors they come late, too. After so many seconds nobody is expected any more.
QUIET_LOOKS = 25
SILENCE_SECONDS = 10.0


class Transport:
    """The live calls of one worker."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._calls: dict[str, Call] = {}
        self._replied: dict[str, Piece] = {}  # in the last poll
        self._lock = threading.Lock()
        self._last_poll = time.monotonic()
        self._looks = 0  # since then
        self._last_news = time.monotonic()
        self._step_seconds = 0.0  # from the news before these, if that was a step's time

    def poll(self, data: list[dict[str, Any]], context: Any) -> list[str | None] | None:
        """One exchange. `context` is TorchServe's: request ids and headers in, statuses and criteria out.

        None in the list: no reply to that request, which is being prepared. None instead of a list: nothing may be
        sent, since TorchServe holds a reply too many.
        """
        call_ids: list[str] = [context.get_request_id(index) for index in range(len(data))]
        if self._is_behind(call_ids, data):
            logger.warning("TorchServe read a reply to the group before this one; this poll takes its place")
            return None
        with self._lock:
            self._service.loop.resume()
            for call_id in self._calls.keys() - set(call_ids):
                self._leave(self._calls.pop(call_id))
            for index, call_id in enumerate(call_ids):
                if call_id not in self._calls:
                    self._calls[call_id] = self._open(call_id, index, data[index], context)
            if self._service.deliver(self._patience()):
                self._note_news()
            calls = [self._calls[call_id] for call_id in call_ids]
            pieces = [call.piece() if call.has_status else None for call in calls]
            self._replied = {
                call_id: piece for call_id, piece in zip(call_ids, pieces, strict=True) if piece is not None
            }
            for call_id, piece in self._replied.items():
                if piece.is_last:
                    del self._calls[call_id]
            self._last_poll = time.monotonic()
            self._looks = 0
        for index, one in enumerate(pieces):
            if one is not None and one.is_first:
                context.set_response_status(one.status, http.HTTPStatus(one.status).phrase, index)
                context.set_response_content_type(index, one.content_type)
        context.stopping_criteria = [None if one is None else _criterion(one) for one in pieces]
        return [None if one is None else one.text for one in pieces]

    def is_quiet(self, seconds: float) -> bool:
        """Is nobody live, and has nobody been for so many seconds?"""
        with self._lock:
            return not self._calls and time.monotonic() - self._last_poll > seconds

    def watch(self) -> None:
        """A look, to be taken every 10 ms or so: stop working for clients that nobody asks for any more."""
        with self._lock:
            self._looks += 1
            if self._calls and self._looks == QUIET_LOOKS:
                self._service.loop.suspend()
            if time.monotonic() - self._last_poll > SILENCE_SECONDS:
                for call in self._calls.values():
                    self._leave(call)

    def _is_behind(self, call_ids: list[str], data: list[dict[str, Any]]) -> bool:
        """TorchServe has not read the last poll's replies: it would not send a body again, nor a call that has
        ended."""
        replied = ((self._replied.get(call_id), item) for call_id, item in zip(call_ids, data, strict=True))
        return any(piece is not None and (piece.is_last or bool(item)) for piece, item in replied)

    def _open(self, call_id: str, index: int, item: dict[str, Any], context: Any) -> Call:
        """TorchServe parses what is sent as application/json, and passes on, as bytes, all else and what it could not
        parse."""
        path = context.get_request_header(index, "url_path") or ""
        part = context.get_request_header(index, "body")  # of the body's part, unless a client's header has that name
        is_json = isinstance(part, dict) and part.get("content-type", "").startswith("application/json")
        return self._service.open(call_id, path, item.get("body", item.get("data")), is_json=is_json)

    def _leave(self, call: Call) -> None:
        if not call.ended:
            logger.info("request %s is aborted: its client has left", call.call_id)
            self._service.abort(call, RequestError("the server was held up and gave this request up", status=503))

    # ---- the engine's rhythm ----

    def _patience(self) -> float:
        """How long to wait for news: not at all for somebody's last piece, a moment while anybody is new, else until
        shortly before the next step ends, if it takes as long as the last: the poll after that takes who came."""
        calls = self._calls.values()
        preparing = [call for call in calls if call.state is State.PREPARING]
        deadline = time.monotonic() + (ALONE_SECONDS if len(preparing) == len(calls) else PREPARE_SECONDS)
        for call in preparing:
            call.wait_until_prepared(deadline - time.monotonic())
        if any(call.ended for call in calls):
            return 0
        if any(call.is_new for call in calls):
            return POLL_SECONDS
        return max(POLL_SECONDS, self._last_news + PART_OF_STEP * self._step_seconds - time.monotonic())

    def _note_news(self) -> None:
        seconds = time.monotonic() - self._last_news
        self._last_news += seconds
        self._step_seconds = seconds if seconds <= LONGEST_STEP_SECONDS else 0.0


def _criterion(piece: Piece) -> Callable[[Any], bool | None]:
    """TorchServe calls it with the piece's text."""
    criterion = None if piece.is_first and piece.is_last else piece.is_last
    return lambda _text: criterion
