"""Owns what a worker's connection to TorchServe needs beyond TorchServe's own code.

It is read in large pieces. TorchServe 0.12 sends every live request with all its headers at every poll, and its worker
asks the socket for each field of them by itself: two thousand calls for 32 requests. Each lets go of the interpreter's
lock, which the engine's thread takes at once, and has to win it back: together they held up both threads for a fifth of
the time.

Bodies come as they were sent: TorchServe's worker would parse JSON between two polls, and log a traceback where it
cannot.

A request can be left out of a reply, and hears nothing until a later one.

A poll can be left unanswered. TorchServe 0.12 keeps one queue of replies for a worker and does not empty it when the
worker's group is lost: a reply that arrived just then is taken for the answer to the new group's first message, and
from then on every poll for that of the one before. Sooner or later such an answer names a request that TorchServe has
already closed, and TorchServe kills the group again. One poll without a reply takes up the surplus.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from typing import Any

from ts import service
from ts.protocol import otf_message_handler

PIECE_BYTES = 1 << 18


class BufferedReader:
    """Takes the place of TorchServe's `_retrieve_buffer`: the next `length` bytes of a connection."""

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._data = b""
        self._position = 0

    def __call__(self, connection: socket.socket, length: int) -> bytearray:
        """Wait for the bytes; a connection that was closed ends the process, as it does in TorchServe's own."""
        if connection is not self._connection:
            self._connection, self._data, self._position = connection, b"", 0
        end = self._position + length
        if end > len(self._data):
            pieces = [self._data[self._position :]]
            missing = end - len(self._data)
            while missing > 0:
                piece = connection.recv(max(missing, PIECE_BYTES))
                if not piece:
                    sys.exit(0)
                pieces.append(piece)
                missing -= len(piece)
            self._data, self._position, end = b"".join(pieces), 0, length
        part = bytearray(self._data[self._position : end])
        self._position = end
        return part


class NoReply(list[str | None]):
    """What a handler returns when nothing is to be sent; of any length that TorchServe's worker expects."""


def _replies_if_any(
    replies: list[str | None] | None, call_ids: Mapping[int, str], *args: Any, **kwargs: Any
) -> bytes | bytearray | None:
    """Takes the place of TorchServe's `create_predict_response`."""
    if isinstance(replies, NoReply):
        return b""
    if replies is not None:
        call_ids = {index: call_id for index, call_id in call_ids.items() if replies[index] is not None}
    message: bytearray | None = otf_message_handler.create_predict_response(replies, call_ids, *args, **kwargs)
    return message


def install() -> None:
    """From now on TorchServe's worker in this process reads in large pieces, parses no body, and sends no `NoReply` and
    no reply that is None."""
    os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
    otf_message_handler._retrieve_buffer = BufferedReader()
    service.create_predict_response = _replies_if_any
