"""A second front, as small as one can be: HTTP over asyncio's streams, and nothing but the service below."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Iterator

from handler.call import Piece
from handler.errors import RequestError
from handler.service import Service


class AsyncioFront:
    """Serves any number of connections on a free port of the loopback, one request on each."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._ids = itertools.count()

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """The address, with a thread that runs the event loop and one that delivers what the engine makes."""
        loop, ended = asyncio.new_event_loop(), threading.Event()
        threads = [threading.Thread(target=loop.run_forever), threading.Thread(target=self._deliver, args=(ended,))]
        for thread in threads:
            thread.start()
        start = asyncio.start_server(self._connection, "127.0.0.1", 0)
        server = asyncio.run_coroutine_threadsafe(start, loop).result()
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            ended.set()
            loop.call_soon_threadsafe(server.close)
            loop.call_soon_threadsafe(loop.stop)
            for thread in threads:
                thread.join()

    def _deliver(self, ended: threading.Event) -> None:
        while not ended.is_set():
            self._service.deliver(0.1)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        path = head.split()[1].strip("/")
        length = int(head.partition("content-length:")[2].split()[0]) if "content-length:" in head else 0
        body = await reader.readexactly(length)
        left = asyncio.ensure_future(reader.read())  # ends when the client closes its side
        with contextlib.suppress(ConnectionError):
            async for piece in self._pieces(path, body, left):
                if piece.is_first:
                    line = (
                        f"HTTP/1.1 {piece.status} -\r\nContent-Type: {piece.content_type}\r\nConnection: close\r\n\r\n"
                    )
                    writer.write(line.encode())
                writer.write(piece.text.encode())
                await writer.drain()
        left.cancel()
        writer.close()

    async def _pieces(self, path: str, body: bytes, left: asyncio.Future[bytes]) -> AsyncIterator[Piece]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        left.add_done_callback(lambda _: news.set())

        def on_news() -> None:
            loop.call_soon_threadsafe(news.set)

        call_id = str(next(self._ids))
        call = await asyncio.to_thread(self._service.open, call_id, path, body, is_json=True, on_news=on_news)
        while not left.done():
            if call.has_status:
                piece = call.piece()
                yield piece
                if piece.is_last:
                    return
            await news.wait()
            news.clear()
        self._service.abort(call, RequestError("the client has left"))
