"""Owns which adapters all ranks hold in host memory, and what waits until one has come or gone. On rank 0.

Nothing is read in a step: a request whose adapter is not held waits here, and not in the scheduler's queue, where it
would hold up others.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Set

from llama2.adapters.reference import AdapterRef
from llama2.engine.lockstep import Lockstep
from llama2.engine.residents import Residents
from llama2.engine.runner import Runner
from llama2.engine.sequence import Errand, FinishReason, Output, Request


class AdapterLoads:
    """Loads one adapter at a time on all ranks, and drops the least recently used for it where there is no room."""

    def __init__(
        self, group: Lockstep, residents: Residents, max_held: int, in_use: Callable[[], Set[AdapterRef]]
    ) -> None:
        """`in_use` are the adapters of the scheduler's live requests."""
        self._group = group
        self._residents = residents
        self._max_held = max_held
        self._in_use = in_use
        self._held: OrderedDict[AdapterRef, bytes] = OrderedDict()  # with identities, the least recently used first
        self._waiting: OrderedDict[AdapterRef, list[Request | Errand]] = OrderedDict()
        self._loading: AdapterRef | None = None
        self._unloads: list[Errand] = []

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._loading or self._unloads)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for their adapter."""
        return sum(isinstance(one, Request) for those in self._waiting.values() for one in those)

    def is_waiting(self, request_id: str) -> bool:
        return any(one.request_id == request_id for those in self._waiting.values() for one in those)

    def identity(self, ref: AdapterRef) -> bytes | None:
        """Of an adapter that is held; None if it is not."""
        if ref in self._held:
            self._held.move_to_end(ref)
        return self._held.get(ref)

    def wait(self, one: Request | Errand) -> None:
        """`advance` gives it back when its adapter is held, or says why that cannot be."""
        assert one.adapter is not None
        self._waiting.setdefault(one.adapter, []).append(one)

    def unload(self, errand: Errand) -> None:
        """Drop an adapter as soon as no request has it."""
        self._unloads.append(errand)

    def abort(self, request_id: str) -> list[Output]:
        """Drop a request that waits; the last Output of each of its replies."""
        for ref, those in list(self._waiting.items()):
            for one in those:
                if one.request_id == request_id and isinstance(one, Request):
                    those.remove(one)
                    if not those:
                        del self._waiting[ref]
                    return [Output(request_id=request_id, index=index, finish_reason="abort") for index in range(one.n)]
        return []

    def advance(self) -> tuple[list[Request], list[Output]]:
        """Once in each step: the requests whose adapters are held from now on, and what there is to say to others."""
        ready, outputs = [], []
        if self._loading is not None and self._group.call(Runner.has_read_adapter):
            ref, self._loading = self._loading, None
            identity, problem = self._group.call(Runner.finish_adapter)
            if not problem:
                self._held[ref] = identity
            for one in self._waiting.pop(ref, ()):
                if isinstance(one, Request) and not problem:
                    ready.append(one)
                else:
                    outputs += _end(one, problem)
        using = self._in_use() | {one.adapter for one in ready} if self._unloads or self._waiting else set()
        for errand in list(self._unloads):
            if errand.adapter not in using and errand.adapter not in self._waiting and errand.adapter != self._loading:
                self._drop(errand.adapter)
                self._unloads.remove(errand)
                outputs += _end(errand, "")
        if self._waiting and self._loading is None and self._make_room(using):
            self._loading = next(iter(self._waiting))
            self._group.call(Runner.load_adapter, self._loading)
        return ready, outputs

    def _make_room(self, using: Set[AdapterRef | None]) -> bool:
        while len(self._held) >= self._max_held:
            idle = next((ref for ref in self._held if ref not in using), None)
            if idle is None:
                return False
            self._drop(idle)
        return True

    def _drop(self, ref: AdapterRef) -> None:
        if self._held.pop(ref, None) is not None:
            self._residents.forget(ref)
            self._group.call(Runner.drop_adapter, ref)


def _end(one: Request | Errand, problem: str) -> list[Output]:
    reason: FinishReason = "error" if problem else "stop"
    return [
        Output(request_id=one.request_id, index=index, finish_reason=reason, problem=problem) for index in range(one.n)
    ]
