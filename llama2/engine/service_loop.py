"""Owns the engine's thread: requests come in from any thread, a step runs while there is work, and outputs are fetched.

Knows no HTTP, and nothing of what a step does.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from llama2.engine.engine import Engine
from llama2.engine.sequence import Errand, Output, Request
from llama2.engine.stats import EngineStats
from llama2.errors import InvalidValue
from llama2.machine.threads import hand_over

logger = logging.getLogger(__name__)


class ServiceLoop:
    """Runs an engine in its own thread, from construction until `close`. Make one on every rank.

    All other methods are for rank 0, from any thread.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None]) -> None:
        """`on_failure` is called in the engine's thread with the error that ended it before `close`.

        From now on the calling thread runs its operators without OpenMP, which is the engine's.
        """
        self.engine = engine
        self._on_failure = on_failure
        self._lock = threading.Condition()
        self._inbox: deque[Request | Errand | str] = deque()  # a request to add, or the id of one to abort
        self._outbox: list[Output] = []
        self._is_closing = False
        self._is_suspended = False
        take_over = hand_over()
        self._thread = threading.Thread(target=self._main, args=(take_over,), name="engine", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidValue: as `Engine.check`, or a live request has the same id.
        """
        self.engine.check(request)
        with self._lock:
            queued = {item.request_id for item in self._inbox if isinstance(item, Request)}
            if request.request_id in queued or self.engine.is_live(request.request_id):
                raise InvalidValue("request_id", f"must be unique among live ones, got {request.request_id!r} twice")
            self._inbox.append(request)
            self._lock.notify_all()

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step; its last Output says "abort". An id that is not live is ignored."""
        with self._lock:
            self._inbox.append(request_id)
            self._lock.notify_all()

    def run_errand(self, errand: Errand) -> None:
        """Load or unload an adapter; an Output says how it went."""
        with self._lock:
            self._inbox.append(errand)
            self._lock.notify_all()

    def suspend(self) -> None:
        """Stop computing after this step and free every block, losing nothing: `resume` continues from there."""
        with self._lock:
            self._is_suspended = True
            self._lock.notify_all()

    def resume(self) -> None:
        """End `suspend`; does nothing if not suspended."""
        if self._is_suspended:
            with self._lock:
                self._is_suspended = False
                self._lock.notify_all()

    def poll(self, timeout: float) -> list[Output]:
        """The outputs since the last poll; waits up to `timeout` seconds for the first."""
        with self._lock:
            self._lock.wait_for(lambda: self._outbox, timeout)
            outputs, self._outbox = self._outbox, []
            return outputs

    def stats(self) -> EngineStats:
        """The engine's; `waiting` includes requests that it has not seen yet."""
        stats = self.engine.stats()
        return replace(stats, waiting=stats.waiting + len(self._inbox))

    def close(self) -> None:
        """End the thread: on rank 0 after this step, and on another rank when rank 0 has closed."""
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
        self._thread.join()

    def _main(self, take_over: Callable[[], None]) -> None:
        take_over()
        try:
            if self.engine.rank == 0:
                self._serve()
            self.engine.close()
        except BaseException as error:
            logger.exception("rank %d: the engine failed at step %d", self.engine.rank, self.engine.stats().steps)
            self._on_failure(error)

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._is_closing or self._inbox or self._has_work)
                if self._is_closing:
                    return
                # Under the lock: `add` finds a live request in the inbox or in the engine.
                while self._inbox:
                    item = self._inbox.popleft()
                    if isinstance(item, Request):
                        self.engine.add(item)
                    elif isinstance(item, Errand):
                        self._outbox += self.engine.run_errand(item)
                    else:
                        self._outbox += self.engine.abort(item)
                is_suspended = self._is_suspended
            outputs = self.engine.preempt_all() if is_suspended else self.engine.step()
            with self._lock:
                self._outbox += outputs
                self._lock.notify_all()

    @property
    def _has_work(self) -> bool:
        return self.engine.holds_blocks if self._is_suspended else self.engine.has_work
