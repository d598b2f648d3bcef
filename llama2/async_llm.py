"""Owns the front for coroutines: as `LLM`, on the engine's own thread, so that all coroutines share batches.

async with AsyncLLM("converted_checkpoints") as llm:
    async for piece in llm.stream("The capital of France is"):
        print(piece.text, end="")
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from llama2.arguments import Dialog, Parameters, Prompt
from llama2.engine.sequence import Completion, Output, Request
from llama2.engine.service_loop import ServiceLoop
from llama2.llm import check_adapters, completion
from llama2.opening import open_model

# How long a close may have to wait for the thread that fetches outputs.
POLL_SECONDS = 0.1


class AsyncLLM:
    """A model and its engine, for coroutines of any event loop. Arguments and results are those of `LLM`, which
    alone has progress bars.

    Under torchrun every rank makes one, rank 0 makes the calls, and `close` of the others waits for rank 0's.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str | None = None,
        *,
        model: Path | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        tokenizer_path: Path | str | None = None,
        **options: Any,
    ) -> None:
        """As `LLM`. Operators of this thread run without OpenMP from now on, which is the engine's."""
        engine, self._arguments = open_model(
            checkpoint_dir, model=model, dtype=dtype, device=device, tokenizer_path=tokenizer_path, **options
        )
        self.rank = engine.rank
        self.tokenizer = engine.tokenizer
        self._mail = mail = _Mail()
        self._loop: ServiceLoop | None = ServiceLoop(engine, mail.fail)
        # Neither thread knows this object: it is closed when nobody has it any more, too.
        self._close = weakref.finalize(self, _close, self._loop, mail, _deliver_in_thread(self._loop, mail))

    async def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        **options: Any,
    ) -> list[Completion]:
        """As `LLM.generate`."""
        return await self._complete(self._arguments.completions(prompts, params, sampling_params, **options))

    async def chat(
        self,
        dialogs: Dialog | Sequence[Dialog],
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        **options: Any,
    ) -> list[Completion]:
        """As `LLM.chat`."""
        return await self._complete(self._arguments.chats(dialogs, params, sampling_params, **options))

    def stream(
        self,
        prompt: Prompt | Dialog,
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        **options: Any,
    ) -> AsyncIterator[Output]:
        """As `LLM.stream`. To leave the loop early, or to cancel the coroutine, aborts the request."""
        request = self._arguments.one(prompt, params, sampling_params, **options)
        self._running.engine.check(request)  # a closed one says so now, and not at the first piece
        return self._pieces([request])

    def close(self) -> None:
        """As `LLM.close`. Coroutines that still wait get a RuntimeError."""
        self._loop = None
        self._close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def _running(self) -> ServiceLoop:
        if self._loop is None:
            raise RuntimeError("this AsyncLLM is closed")
        if self.rank != 0:
            raise RuntimeError(f"rank 0 makes the calls of an AsyncLLM, and this is rank {self.rank}: close() waits")
        return self._loop

    async def _complete(self, requests: list[Request]) -> list[Completion]:
        outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        async for output in self._pieces(requests):
            outputs[output.request_id].append(output)
        return [completion(request, outputs[request.request_id]) for request in requests]

    async def _pieces(self, requests: list[Request]) -> AsyncIterator[Output]:
        loop, box = self._running, _Box()
        unfinished = sum(request.n for request in requests)
        try:
            for request in requests:
                self._mail.open(request.request_id, box)
                loop.add(request)
            while unfinished:
                output = await box.get()
                unfinished -= output.finish_reason is not None
                check_adapters([output])
                yield output
        finally:
            for request in requests:
                self._mail.shut(request.request_id)
                if unfinished:
                    loop.abort(request.request_id)


class _Box:
    """What came for one coroutine, in its event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Output | BaseException] = asyncio.Queue()

    def put(self, news: Output | BaseException) -> None:
        """From any thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, news)

    async def get(self) -> Output:
        news = await self._queue.get()
        if isinstance(news, BaseException):
            raise RuntimeError(f"the engine has ended: {news}") from news
        return news


class _Mail:
    """Which coroutine waits for which request. Any thread may use it."""

    def __init__(self) -> None:
        self.end: BaseException | None = None
        self._boxes: dict[str, _Box] = {}
        self._lock = threading.Lock()

    def open(self, request_id: str, box: _Box) -> None:
        with self._lock:
            self._boxes[request_id] = box
            if self.end is not None:
                box.put(self.end)

    def shut(self, request_id: str) -> None:
        with self._lock:
            self._boxes.pop(request_id, None)

    def deliver(self, outputs: list[Output]) -> None:
        with self._lock:
            for output in outputs:
                if output.request_id in self._boxes:  # else nobody waits any more
                    self._boxes[output.request_id].put(output)

    def fail(self, error: BaseException) -> None:
        """Nothing more will come."""
        with self._lock:
            self.end = self.end or error
            for box in set(self._boxes.values()):
                box.put(self.end)


def _deliver_in_thread(loop: ServiceLoop, mail: _Mail) -> threading.Thread | None:
    """Rank 0's thread that fetches what the engine makes."""
    if loop.engine.rank != 0:
        return None

    def deliver() -> None:
        while mail.end is None:
            mail.deliver(loop.poll(POLL_SECONDS))

    thread = threading.Thread(target=deliver, name="deliver", daemon=True)
    thread.start()
    return thread


def _close(loop: ServiceLoop, mail: _Mail, thread: threading.Thread | None) -> None:
    mail.fail(RuntimeError("this AsyncLLM was closed"))
    loop.close()
    if thread is not None:
        thread.join()
