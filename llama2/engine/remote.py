"""Owns an engine whose ranks are processes of their own: starts them, sends requests, gets outputs, and sees to it that
they live.

It is used as `ServiceLoop` is, by a process that computes nothing: neither a body that takes long to read nor a rank
that dies or hangs keeps the one from the other. Knows no HTTP and no torch.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import cast

from llama2.engine.messages import Abort, Add, Command, Failed, News, Ready, Settings
from llama2.engine.sequence import Errand, Output, Request
from llama2.engine.stats import EngineStats
from llama2.errors import EngineFailure
from llama2.parallel.launch import Ranks

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
CLOSE_SECONDS = 10.0


class RemoteEngine:
    """An engine of `degree` ranks, from construction until `close` or its failure. All methods are for any thread."""

    def __init__(self, settings: Settings, *, degree: int, threads: int, step_timeout: float) -> None:
        """Start the ranks, which load the model; see `wait_until_ready`.

        `threads` is for each rank. If nothing moves for `step_timeout` seconds while there is work, the ranks hang.

        Raises:
            OSError: no process can be started.
        """
        self._step_timeout = step_timeout
        self._lock = threading.Condition()
        self._sending = threading.Lock()
        self._outbox: list[Output] = []
        self._live: dict[str, int] = {}  # replies that have not ended
        self._is_suspended = False
        self._is_closing = False
        self._sent = 0
        self._received = 0
        self._stats: EngineStats | None = None
        self._ready: dict[int, Ready] = {}
        self._failure: EngineFailure | None = None
        self._on_failure: Callable[[EngineFailure], None] | None = None
        self._ranks = Ranks.start("llama2.engine.rank", degree, threads=threads)
        for rank in range(degree):
            self._send(settings, rank=rank)
        self._moved: tuple[object, float] = (None, time.monotonic())
        threading.Thread(target=self._attend, name="ranks", daemon=True).start()

    def wait_until_ready(self) -> Ready:
        """Wait until every rank has loaded the model.

        Raises:
            EngineFailure: one could not; the message says why.
        """
        with self._lock:
            self._lock.wait_for(lambda: self._failure or len(self._ready) == len(self._ranks.processes))
            if self._failure:
                raise self._failure
            return self._ready[0]

    def on_failure(self, callback: Callable[[EngineFailure], None]) -> None:
        """Call this, in whichever thread, when the ranks have failed and are gone; at once if they have already."""
        with self._lock:
            self._on_failure = callback
            failure = self._failure
        if failure:
            callback(failure)

    # ---- as ServiceLoop ----

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidValue: the engine could never run it.
            EngineFailure: there is no engine any more.
        """
        self._ready[0].limits.check(request)
        grammar = None if request.grammar is None else request.grammar.source
        with self._lock:
            self._live[request.request_id] = request.n
            self._sent += 1
        self._send(Add(request=dataclasses.replace(request, grammar=None), grammar=grammar))

    def run_errand(self, errand: Errand) -> None:
        """Load or unload an adapter; an Output says how it went.

        Raises:
            EngineFailure: there is no engine any more.
        """
        with self._lock:
            self._live[errand.request_id] = 1
            self._sent += 1
        self._send(errand)

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step; its last Output says "abort". An id that is not live is ignored."""
        if request_id in self._live and not self._failure:
            self._send(Abort(request_id=request_id))

    def suspend(self) -> None:
        """Stop computing after this step and free every block, losing nothing: `resume` continues from there."""
        if not self._is_suspended and not self._failure:
            self._is_suspended = True
            self._send("suspend")

    def resume(self) -> None:
        """End `suspend`; does nothing if not suspended."""
        if self._is_suspended and not self._failure:
            self._is_suspended = False
            self._send("resume")

    def poll(self, timeout: float) -> list[Output]:
        """The outputs since the last poll; waits up to `timeout` seconds for the first."""
        with self._lock:
            self._lock.wait_for(lambda: self._outbox or self._failure, timeout)
            outputs, self._outbox = self._outbox, []
            return outputs

    def stats(self) -> EngineStats:
        """The engine's; `waiting` includes requests that it has not seen yet."""
        with self._lock:
            stats = cast(EngineStats, self._stats)
            return dataclasses.replace(stats, waiting=stats.waiting + self._sent - self._received)

    def close(self) -> None:
        """End the ranks: after this step, or at once if they have failed or do not listen."""
        self._is_closing = True
        if len(self._ready) == len(self._ranks.processes) and not self._failure:
            for rank in range(len(self._ranks.processes)):
                self._send("close", rank=rank)
            self._ranks.wait(CLOSE_SECONDS)
        else:
            self._ranks.kill()

    # ---- the pipes ----

    def _send(self, message: Settings | Command, *, rank: int = 0) -> None:
        try:
            with self._sending:
                self._ranks.connections[rank].send(message)
        except OSError:
            if not self._is_closing:
                raise self._failure or EngineFailure(f"rank {rank} does not listen any more") from None

    def _attend(self) -> None:
        """Hear what the ranks say, until one of them has failed, hangs, or all were closed."""
        ranks = {connection: rank for rank, connection in enumerate(self._ranks.connections)}
        reason = None
        while reason is None and not self._is_closing:
            for connection in wait(list(ranks), LOOK_SECONDS):
                reason = reason or self._hear(cast(Connection, connection), ranks[cast(Connection, connection)])
            reason = reason or self._hang()
        if not self._is_closing and reason is not None:
            self._fail(reason)

    def _hear(self, connection: Connection, rank: int) -> str | None:
        """Take one message; returns why the ranks have failed, if they have."""
        try:
            message: Ready | Failed | News = connection.recv()
        except (EOFError, OSError):
            return f"rank {rank} {self._ranks.ending(rank)}"
        if isinstance(message, Failed):
            return f"rank {rank}: {message.reason}" if len(self._ranks.processes) > 1 else message.reason
        with self._lock:
            if isinstance(message, Ready):
                self._ready[rank] = message
                self._stats = message.stats
            else:
                self._stats, self._received = message.stats, message.received
                self._outbox += message.outputs
                for output in message.outputs:
                    if output.finish_reason is not None:
                        self._count_end(output.request_id)
            self._lock.notify_all()
        self._moved = (None, time.monotonic())
        return None

    def _count_end(self, request_id: str) -> None:
        self._live[request_id] -= 1
        if not self._live[request_id]:
            del self._live[request_id]

    def _hang(self) -> str | None:
        """Why the ranks seem to hang: they have work, and nothing has moved for too long."""
        operations = self._ranks.operations()
        # A single rank on a CPU has no operations that could be counted, and works as long as it uses the processor.
        works_alone = len(operations) == 1 and bool(self._ready) and self._ready[0].device == "cpu"
        signs = self._ranks.cpu_seconds(0) if works_alone else operations
        if not self._live or self._is_suspended or self._moved[0] not in (None, signs):
            self._moved = (signs, time.monotonic())
            return None
        self._moved = (signs, self._moved[1])
        if (seconds := time.monotonic() - self._moved[1]) < self._step_timeout:
            return None
        last = min(operations)
        late = [f"{rank} ({self._ranks.describe(rank)})" for rank, one in enumerate(operations) if one == last]
        return (
            f"nothing has moved for {seconds:.0f} s (step_timeout): everybody waits for rank {', '.join(late)}, which "
            f"stands at operation {last} of {max(operations)}"
        )

    def _fail(self, reason: str) -> None:
        self._ranks.kill()
        with self._lock:
            self._failure = EngineFailure(reason)
            callback = self._on_failure
            self._lock.notify_all()
        if callback:
            callback(self._failure)
