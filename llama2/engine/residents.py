"""Owns which adapter is in which slot of the device, and which slots may be given away. On rank 0.

Knows no torch and no files. A slot that no running sequence needs keeps its adapter until another one needs the room:
the least recently used goes first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from llama2.adapters.reference import AdapterRef


class Residents:
    """Hands out slots to running sequences; any number of sequences share that of their adapter."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(reversed(range(num_slots)))
        self._slots: OrderedDict[AdapterRef, int] = OrderedDict()  # the least recently used first
        self._holders: Counter[AdapterRef] = Counter()
        self._puts: list[tuple[int, AdapterRef]] = []

    def has_room(self, ref: AdapterRef) -> bool:
        """Is there a slot that has this adapter, or could have it now?"""
        return ref in self._slots or bool(self._free) or self._idle() is not None

    def enter(self, ref: AdapterRef) -> int:
        """One more running sequence has this adapter, for which there is room; returns the slot."""
        if ref not in self._slots:
            if not self._free:
                idle = self._idle()
                assert idle is not None, "no room for another adapter"
                self.forget(idle)
            self._slots[ref] = self._free.pop()
            self._puts.append((self._slots[ref], ref))
        self._slots.move_to_end(ref)
        self._holders[ref] += 1
        return self._slots[ref]

    def leave(self, ref: AdapterRef) -> None:
        """One running sequence less has it."""
        self._holders[ref] -= 1

    def forget(self, ref: AdapterRef) -> None:
        """Free the slot of an adapter that no running sequence has, if it is in one."""
        assert not self._holders[ref], f"{ref} is in use"
        del self._holders[ref]
        slot = self._slots.pop(ref, None)
        if slot is not None:
            self._free.append(slot)
            self._puts = [put for put in self._puts if put[0] != slot]

    def take_puts(self) -> tuple[tuple[int, AdapterRef], ...]:
        """The adapters to put into slots before the next step; each is returned once."""
        puts, self._puts = tuple(self._puts), []
        return puts

    def check_integrity(self, running: Iterable[tuple[AdapterRef, int]]) -> None:
        """Check that the slots' holders are the `running` sequences with an adapter, given with their slots.

        Raises:
            RuntimeError: they are not.
        """
        running = list(running)
        wrong = [(ref.path, slot) for ref, slot in running if self._slots.get(ref) != slot]
        counted = +Counter(ref for ref, _ in running)
        if wrong or counted != +self._holders:
            raise RuntimeError(f"adapter slots {dict(self._slots)} count {self._holders}, but {running} run")

    def _idle(self) -> AdapterRef | None:
        return next((ref for ref in self._slots if not self._holders[ref]), None)
