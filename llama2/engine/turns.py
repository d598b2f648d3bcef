"""Owns the steps of an engine that has no thread of its own: those who wait for outputs make them, in turns.

One thread steps at a time, for all that wait, so that the requests of several threads share batches. In a group of
ranks each rank has one thread, and all make the same calls: rank 0 steps, and gives the others what it has gained.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

from llama2.engine.engine import Engine
from llama2.engine.sequence import Output, Request


class Gains:
    """What a call's requests have gained. `unfinished` counts the replies that have not ended."""

    def __init__(self, requests: Sequence[Request], on_end: Callable[[], object] = lambda: None) -> None:
        """`on_end` is called when a reply ends."""
        self.requests = requests
        self.outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        self.unfinished = sum(request.n for request in requests)
        self._on_end = on_end

    def take(self, output: Output) -> None:
        self.outputs[output.request_id].append(output)
        if output.finish_reason is not None:
            self.unfinished -= 1
            self._on_end()


class Turns:
    """Makes the steps of an engine. Any thread of a group of one may call; else one thread of each rank."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._changed = threading.Condition()
        self._is_stepping = False
        self._inbox: deque[Request | str] = deque()  # a request to add, or the id of one to abort
        self._open: dict[str, Gains] = {}

    @property
    def engine(self) -> Engine:
        """
        Raises:
            RuntimeError: it was closed.
        """
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def add(self, gains: Gains) -> None:
        """Queue its requests.

        Raises:
            InvalidValue: one of them can never run; none is queued.
        """
        for request in gains.requests:
            self.engine.check(request)
        with self._changed:
            self._open |= dict.fromkeys(gains.outputs, gains)
            self._inbox += gains.requests

    def advance(self, is_done: Callable[[], bool]) -> None:
        """Step until `is_done`, which looks at what was gained; not at all if that is so already.

        Raises:
            RuntimeError: the group has several ranks, and another thread is in a call.
        """
        if self.engine.rank != 0:
            if not is_done():
                self._deliver(self.engine.follow())
            return
        gained: list[Output] = []
        with self._changed:
            if is_done():
                return
            while not is_done():
                if not self._is_stepping:
                    gained += self._step()
                elif self.engine.world_size > 1:
                    raise RuntimeError("under torchrun one thread of each rank makes all calls of an LLM")
                else:
                    self._changed.wait()
        self.engine.release(gained)

    def drop(self, gains: Gains) -> None:
        """Forget a call's requests; those that have not ended are aborted, and give their blocks back."""
        with self._changed:
            for request_id in gains.outputs:
                if self._open.pop(request_id, None) is not None and gains.unfinished:
                    self._inbox.append(request_id)
            if not self._is_stepping:
                self._empty_inbox()

    def reset_prefix_cache(self) -> None:
        """Between two steps."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_stepping)
            self.engine.reset_prefix_cache()

    def close(self) -> None:
        """Let go of the engine, after the step that runs. Every rank calls it; calls after it raise RuntimeError."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_stepping)
            if self._engine is not None:
                self._engine.close()
                self._engine = None
            self._changed.notify_all()

    def _step(self) -> list[Output]:
        """The lock is held, and given away while the engine is busy."""
        engine = self.engine
        self._empty_inbox()
        assert engine.has_work
        self._is_stepping = True
        self._changed.release()
        try:
            outputs = engine.step()
        finally:
            self._changed.acquire()
            self._is_stepping = False
            self._changed.notify_all()
        self._deliver(outputs)
        return outputs

    def _empty_inbox(self) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if self.engine.rank != 0:
                continue
            if isinstance(item, Request):
                self.engine.add(item)
            else:
                self.engine.abort(item)

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.request_id in self._open:  # else it was dropped
                self._open[output.request_id].take(output)
