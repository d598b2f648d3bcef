"""Owns the order of work: which tokens of which sequences the next forward pass computes, and who waits.

Knows no torch, no text and no finish reason: the engine runs a plan, samples, and says when a sequence is finished.

The central invariant: **running sequences are older than waiting ones, and only the youngest running one
can have an unfinished prefill.** Sequences are admitted in order of arrival, a prefill takes all of the step's tokens
that are left unless it ends, and only the youngest is ever preempted. So one pass over the running ones in order of
arrival serves the decodes first, and preempts only sequences that it has not placed yet.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from llama2.adapters.reference import AdapterRef
from llama2.config import EngineConfig
from llama2.engine.block_manager import BlockManager
from llama2.engine.residents import Residents
from llama2.engine.sequence import FinishReason, Sequence, Status

logger = logging.getLogger(__name__)

Logits = Literal["none", "last", "all"]


class Chunk(NamedTuple):
    """Consecutive tokens of one sequence, at positions start, start + 1, … of its KV cache.

    `key` is the sequence's arrival. `block_table` ends with the chunk's last block; it is a copy, 32 bits each, that
    nobody writes into. `logits` says at which of its tokens they are wanted: at none, at the last, or at all.
    After `token_ids` come the tokens that are `unread`: their places in the device's token pool. `slot` is that of the
    sequence's adapter, -1 without one.
    """

    key: int
    start: int
    token_ids: tuple[int, ...]
    block_table: array[int]
    logits: Logits
    unread: tuple[int, ...] = ()
    slot: int = -1

    @property
    def length(self) -> int:
        return len(self.token_ids) + len(self.unread)

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def num_logits(self) -> int:
        return self.length if self.logits == "all" else int(self.logits == "last")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One forward pass. Before anything is written the (from, to) blocks of `copies` are copied, in this order, and the
    adapters of `puts` put into slots.
    """

    chunks: tuple[Chunk, ...]
    copies: tuple[tuple[int, int], ...] = ()
    puts: tuple[tuple[int, AdapterRef], ...] = ()

    @property
    def has_unread(self) -> bool:
        """Does it need the token pool?"""
        return any(chunk.unread for chunk in self.chunks)

    def __reduce__(self) -> tuple[Any, ...]:
        # A plan is sent in every step. With tables as plain bytes, pickle stays in its C code.
        rows = [(*chunk[:3], chunk.block_table.tobytes(), *chunk[4:]) for chunk in self.chunks]
        return _plan_of, (rows, self.copies, self.puts)


class Scheduler:
    """Continuous batching with chunked prefill, first come first served.

    A step is `schedule()`, then `fork()` for each prompt of several replies that it completes, then `advance()` with
    the sequences that gain a token, `update()` with these tokens, and `finish()` for each sequence that ended. The next
    `schedule()` may come before `update()`: it plans with tokens that are unread.
    `add` and `abort` belong between steps. A step's cost depends only on the sequences running and admitted in it:
    waiting ones cost nothing.
    """

    def __init__(self, config: EngineConfig, blocks: BlockManager, residents: Residents | None = None) -> None:
        """Sequences with adapters need `residents`."""
        self._config = config
        self._blocks = blocks
        self._residents = residents or Residents(0)
        # Both by arrival, oldest first.
        self._running: dict[int, Sequence] = {}
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        # The replies of each live request that have not ended.
        self._by_request_id: dict[str, list[Sequence]] = {}
        self._last_arrival = -1
        self._free_places = list(range(config.max_batch_size))  # of the token pool
        # Over all sequences started: their tokens at that time, and how many of these were in the cache.
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    @property
    def running(self) -> Mapping[int, Sequence]:
        """The running sequences by key, oldest first."""
        return MappingProxyType(self._running)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def adapters(self) -> set[AdapterRef]:
        """Those of all live sequences."""
        live = (siblings[0].request.adapter for siblings in self._by_request_id.values())
        return {ref for ref in live if ref is not None}

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence. It arrived after all others, and at its longest fits into the empty KV cache.

        Its forks take the arrivals that follow its own, and batch places are reserved for them.

        Raises:
            ValueError: a live sequence has the same request id.
        """
        request_id = sequence.request.request_id
        if request_id in self._by_request_id:
            raise ValueError(f"request_id must be unique among live requests, got {request_id!r} twice")
        assert sequence.arrival > self._last_arrival, f"arrival {sequence.arrival} after {self._last_arrival}"
        self._last_arrival = sequence.arrival + sequence.num_forks
        self._by_request_id[request_id] = [sequence]
        self._waiting[sequence.arrival] = sequence

    def abort(self, request_id: str) -> list[Sequence]:
        """Drop a request's live sequences, running or waiting, and free their blocks. Returns what was dropped."""
        dropped = list(self._by_request_id.get(request_id, ()))
        for sequence in dropped:
            self.finish(sequence, "abort")
        return dropped

    def is_live(self, request_id: str) -> bool:
        """Has some reply of the request not ended yet?"""
        return request_id in self._by_request_id

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Remove a live sequence and free its blocks."""
        siblings = self._by_request_id[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._by_request_id[sequence.request.request_id]
        if sequence.status is Status.RUNNING:
            del self._running[sequence.arrival]
            self._free(sequence)
        else:
            del self._waiting[sequence.arrival]
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason

    def schedule(self) -> Plan | None:
        """Plan the next step, or return None when there is no work, or none before `update`.

        The oldest sequence is in every plan, so all of them finish. After a preemption nothing is admitted in the same
        step: the freed blocks belong to older sequences.

        Raises:
            RuntimeError: a sequence was added that does not fit into the whole KV cache.
        """
        if not self.has_work:
            return None
        chunks: list[Chunk] = []
        budget = self._config.max_step_tokens
        for sequence in list(self._running.values()):
            if sequence.status is not Status.RUNNING:
                break  # preempted, as are all younger ones
            if sequence.num_unread and sequence.is_complete(self._config.max_seq_len):
                continue  # it ends with its unread token
            length = min(sequence.num_uncomputed, budget)
            if not self._make_room(sequence, length):
                break
            chunks.append(_chunk(sequence, length))
            budget -= length
        else:
            chunks += self._admit(budget)
        if not chunks:
            if self._running:
                return None
            oldest = next(iter(self._waiting.values()))
            raise RuntimeError(
                f"request {oldest.request.request_id!r} of {oldest.num_tokens} tokens does not fit into the empty "
                f"KV cache of {self._blocks.num_blocks} blocks of {self._blocks.block_size}"
            )
        return Plan(chunks=tuple(chunks), copies=self._blocks.take_copies(), puts=self._residents.take_puts())

    def fork(self, sequence: Sequence) -> list[Sequence]:
        """The other replies to a prompt that the last plan completes: running from now on, on the same blocks."""
        forks = sequence.fork()
        for fork in forks:
            self._blocks.share(fork.block_table)
            self._by_request_id[fork.request.request_id].append(fork)
            self._start(fork)
        if forks:
            self._running = dict(sorted(self._running.items()))
        return forks

    def advance(self, plan: Plan, gaining: Iterable[Sequence]) -> None:
        """Record what a plan computes, and that these sequences gain an unread token each, in this order.

        Sequences that ended since it was made are skipped.
        """
        for chunk in plan.chunks:
            sequence = self._running.get(chunk.key)
            if sequence is None:
                continue
            assert sequence.num_computed == chunk.start, f"out of order for key {chunk.key}"
            sequence.num_computed += chunk.length
            self._blocks.name_blocks(sequence, chunk.start)
        for sequence in gaining:
            assert sequence.num_uncomputed == 0, f"a token amid the prefill of {sequence.arrival}"
            sequence.num_unread += 1

    def update(self, sampled: Iterable[tuple[Sequence, int]]) -> list[Sequence]:
        """Add the tokens that sequences gained in `advance`, now read. Returns those that have not ended since."""
        gained = []
        for sequence, token_id in sampled:
            if sequence.status is not Status.FINISHED:
                sequence.num_unread -= 1
                sequence.token_ids.append(token_id)
                gained.append(sequence)
        return gained

    def preempt_all(self) -> None:
        """Free every block; running sequences wait, and restart with the next plan."""
        while self._running:
            self._preempt_youngest()

    def check_integrity(self) -> None:
        """Check that no block and no adapter's slot leaked; see `BlockManager` and `Residents`."""
        self._blocks.check_integrity(chain.from_iterable(self._by_request_id.values()))
        running = ((sequence.request.adapter, sequence.slot) for sequence in self._running.values())
        self._residents.check_integrity((ref, slot) for ref, slot in running if ref is not None)

    def _admit(self, budget: int) -> list[Chunk]:
        """Start waiting sequences while the token budget, the batch size and the free blocks allow.

        A sequence starts only when all of its tokens would fit now, though its blocks are taken chunk by chunk:
        otherwise a long prompt would be prefilled in vain, preempted and restarted while older ones fill the cache.
        One whose adapter finds no slot waits for one, and so do those behind it.
        """
        chunks: list[Chunk] = []
        if not self._waiting or len(self._running) >= self._config.max_batch_size:
            return chunks
        places = self._config.max_batch_size - sum(1 + sequence.num_forks for sequence in self._running.values())
        while self._waiting and budget > 0:
            sequence = next(iter(self._waiting.values()))
            ref = sequence.request.adapter
            places -= 1 + sequence.num_forks
            if places < 0 or not (ref is None or self._residents.has_room(ref)):
                break
            if not self._blocks.adopt_prefix(sequence):
                break
            self.num_prompt_tokens += sequence.num_tokens
            self.num_cached_tokens += sequence.num_computed
            if sequence.num_cached is None:
                sequence.num_cached = sequence.num_computed
            del self._waiting[sequence.arrival]
            self._start(sequence)
            length = min(sequence.num_uncomputed, budget)
            self._blocks.grow(sequence, sequence.num_computed + length)
            chunks.append(_chunk(sequence, length))
            budget -= length
        return chunks

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence the blocks for its next `length` tokens, preempting the youngest if needed.

        Returns False if it was the youngest itself and now waits.
        """
        while not self._blocks.grow(sequence, sequence.num_computed + length):
            if self._preempt_youngest() is sequence:
                return False
        return True

    def _preempt_youngest(self) -> Sequence:
        """Send it to the front of the queue: it is older than all there. It keeps its tokens."""
        _, sequence = self._running.popitem()
        logger.debug("request %r is preempted at %d tokens", sequence.request.request_id, sequence.num_tokens)
        self._free(sequence)
        sequence.num_computed = 0
        sequence.status = Status.WAITING
        self._waiting[sequence.arrival] = sequence
        self._waiting.move_to_end(sequence.arrival, last=False)
        return sequence

    def _start(self, sequence: Sequence) -> None:
        self._running[sequence.arrival] = sequence
        sequence.status = Status.RUNNING
        sequence.pool_place = self._free_places.pop()
        if sequence.request.adapter is not None:
            sequence.slot = self._residents.enter(sequence.request.adapter)

    def _free(self, sequence: Sequence) -> None:
        """Release what a sequence holds while it runs."""
        self._blocks.free(sequence)
        self._free_places.append(sequence.pool_place)
        if sequence.request.adapter is not None:
            self._residents.leave(sequence.request.adapter)


def _chunk(sequence: Sequence, length: int) -> Chunk:
    assert length > 0, f"request {sequence.request.request_id!r} has nothing to compute, but was not finished"
    end = sequence.num_computed + length
    token_ids = tuple(sequence.token_ids[sequence.num_computed : end])
    logits: Logits = "none"
    if sequence.request.wants_prompt_logits and sequence.num_generated == 0:
        logits = "all"
    elif end == sequence.num_tokens:
        logits = "last"
    return Chunk(
        key=sequence.arrival,
        start=sequence.num_computed,
        token_ids=token_ids,
        block_table=sequence.block_table[:],
        logits=logits,
        unread=tuple(range(sequence.pool_place, sequence.pool_place + length - len(token_ids))),
        slot=sequence.slot,
    )


def _plan_of(
    rows: list[tuple[Any, ...]], copies: tuple[tuple[int, int], ...], puts: tuple[tuple[int, AdapterRef], ...]
) -> Plan:
    """The plan that was pickled."""
    chunks = tuple(Chunk._make((*row[:3], array("i", row[3]), *row[4:])) for row in rows)
    return Plan(chunks=chunks, copies=copies, puts=puts)
