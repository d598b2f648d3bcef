"""A worker reads TorchServe's messages in large pieces, and gets every byte of them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from ts import service
from ts.context import Context, RequestProcessor
from ts.protocol import otf_message_handler

from handler.torchserve import wire

HEADERS = {"host": "127.0.0.1:8080", "url_path": "v1/completions", "user-agent": "test"}


def field(content: bytes) -> bytes:
    return struct.pack("!i", len(content)) + content


def message(bodies: list[bytes], content_type: bytes = b"application/octet-stream") -> bytes:
    """A poll with a request of each body, as TorchServe writes it."""
    end = struct.pack("!i", -1)
    requests = [
        field(f"id-{index}".encode())
        + b"".join(field(name.encode()) + field(value.encode()) for name, value in HEADERS.items())
        + end
        + field(b"body")
        + field(content_type)
        + field(body)
        + end
        for index, body in enumerate(bodies)
    ]
    return b"I" + b"".join(requests) + end


class Connection:
    """A socket that counts how often it is read, and gives `piece` bytes at most at a time."""

    def __init__(self, end: socket.socket, piece: int) -> None:
        self._end = end
        self._piece = piece
        self.reads = 0

    def recv(self, length: int) -> bytes:
        self.reads += 1
        return self._end.recv(min(length, self._piece))


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    monkeypatch.setattr(otf_message_handler, "_retrieve_buffer", otf_message_handler._retrieve_buffer)
    monkeypatch.setattr(service, "create_predict_response", service.create_predict_response)
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    wire.install()
    with contextlib.ExitStack() as stack:
        server, worker = (stack.enter_context(end) for end in socket.socketpair())
        yield server, worker


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_messages_arrive_whole_however_they_were_cut(ends: tuple[socket.socket, socket.socket], piece: int) -> None:
    server, worker = ends
    connection = Connection(worker, piece)
    bodies = [[b"x" * 3000, b"", b"\xff\x00"], [], [b"y"]]
    server.sendall(b"".join(message(each) for each in bodies))
    for each in bodies:
        command, requests = otf_message_handler.retrieve_msg(connection)
        assert command == b"I"
        assert [request["parameters"][0]["value"] for request in requests] == each
        for request in requests:
            headers = {header["name"].decode(): header["value"].decode() for header in request["headers"]}
            assert headers == HEADERS


def test_a_poll_is_read_in_one_piece(ends: tuple[socket.socket, socket.socket]) -> None:
    """It never asks for more than is there: the reader must not wait for a next message."""
    server, worker = ends
    connection = Connection(worker, 1 << 20)
    for _ in range(3):
        server.sendall(message([b"{}"] * 32))
        otf_message_handler.retrieve_msg(connection)
    assert connection.reads == 3


def test_another_connection_begins_anew(ends: tuple[socket.socket, socket.socket]) -> None:
    server, worker = ends
    server.sendall(message([b"{}"]) + b"half a message of a server that was killed")
    otf_message_handler.retrieve_msg(worker)
    with contextlib.ExitStack() as stack:
        server, worker = (stack.enter_context(end) for end in socket.socketpair())
        server.sendall(message([b"new"]))
        _, (request,) = otf_message_handler.retrieve_msg(worker)
        assert request["parameters"][0]["value"] == b"new"


def test_a_worker_whose_server_is_gone_ends(ends: tuple[socket.socket, socket.socket]) -> None:
    server, worker = ends
    server.close()
    with pytest.raises(SystemExit):
        otf_message_handler.retrieve_msg(worker)


def test_a_body_comes_as_it_was_sent_and_a_broken_one_logs_nothing(
    ends: tuple[socket.socket, socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    server, worker = ends
    bodies = [b'{"prompt": "a"}', b'{"prompt": ', b"caf\xe9"]
    for content_type in (b"application/json", b"text/plain"):
        server.sendall(message(bodies, content_type))
        _, requests = otf_message_handler.retrieve_msg(worker)
        assert [request["parameters"][0]["value"] for request in requests] == bodies
    assert "decoding" not in caplog.text


def test_a_request_without_a_reply_is_left_out_of_the_message(ends: tuple[socket.socket, socket.socket]) -> None:
    context = Context("llama", "", None, 1, None, "0")
    context.stopping_criteria = [None, lambda _: False]
    context.request_processor = [RequestProcessor({}), RequestProcessor({})]
    sent = service.create_predict_response([None, "text"], {0: "waits", 1: "hears"}, "", 200, context=context)
    assert b"waits" not in sent
    assert field(b"hears") in sent
    assert field(b"text") in sent
    assert service.create_predict_response(wire.NoReply(["", ""]), {0: "a", 1: "b"}, "", 200, context=context) == b""
