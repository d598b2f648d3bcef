"""A scheduler that drives a fake model, whose every token depends on every earlier one, read through a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

from llama2.config import EngineConfig
from llama2.engine.block_manager import BlockManager
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.scheduler import Chunk, Plan, Scheduler
from llama2.engine.sequence import Request, Sequence, Status


def next_token(token_ids: Items[int]) -> int:
    return hash(tuple(token_ids)) % 1_000_003


def expected_tokens(sequence: Sequence) -> list[int]:
    """What the fake model generates for this request when nothing else runs and nothing is cached."""
    token_ids = list(sequence.request.prompt_ids)
    while len(token_ids) < len(sequence.token_ids):
        token_ids.append(next_token(token_ids))
    return token_ids


class FakeModel:
    """Writes each chunk's ids into a cache of (block, offset), then continues what it reads back through the table.

    Blocks are never wiped, so a wrong table reads some other sequence's ids, as it would on a device.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cache: dict[tuple[int, int], int] = {}

    def run(self, plan: Plan, pool: Mapping[int, int]) -> dict[int, int]:
        """The next ids by key; `pool` has those that are unread, by place."""
        for chunk in plan.chunks:
            token_ids = (*chunk.token_ids, *(pool[place] for place in chunk.unread))
            for position, token_id in enumerate(token_ids, start=chunk.start):
                self.cache[self._slot(chunk, position)] = token_id
        return {chunk.key: next_token(self._read(chunk)) for chunk in plan.chunks if chunk.logits == "last"}

    def _read(self, chunk: Chunk) -> list[int]:
        return [self.cache[self._slot(chunk, position)] for position in range(chunk.end)]

    def _slot(self, chunk: Chunk, position: int) -> tuple[int, int]:
        return chunk.block_table[position // self.block_size], position % self.block_size


class Trial:
    """A scheduler with its fake model; every step checks what must hold at every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_step_tokens: int = 16,
        max_batch_size: int = 4,
        families: int = 1000,
        prefix_cache: bool = True,
        looks_ahead: bool = False,
    ) -> None:
        """Prompts of one family begin alike: there are `families` of them, and requests belong to them in turn.

        `looks_ahead`: each step is planned before the tokens of the one before are read.
        """
        self.config = EngineConfig(
            max_batch_size=max_batch_size, max_step_tokens=max_step_tokens, block_size=block_size, max_seq_len=1024
        )
        self.blocks = BlockManager(num_blocks, block_size, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(self.config, self.blocks)
        self.model = FakeModel(block_size)
        self.sequences: list[Sequence] = []
        self.families = families
        self.looks_ahead = looks_ahead
        self.unread: list[tuple[Sequence, int]] = []
        self.pool: dict[int, int] = {}
        self.steps = 0
        self.preemptions = 0

    def add(self, prompt_length: int, max_new_tokens: int = 3, *, score: bool = False) -> Sequence:
        arrival = len(self.sequences)
        request = Request(
            request_id=f"r{arrival}",
            prompt_ids=tuple(1000 * (arrival % self.families) + position for position in range(prompt_length)),
            params=SamplingParams(max_new_tokens=max_new_tokens),
            score=score,
        )
        sequence = Sequence.of(request, arrival)
        self.sequences.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Plan | None:
        before = {key: sequence.num_computed for key, sequence in self.scheduler.running.items()}
        plan = self.scheduler.schedule()
        if plan is None and self.unread:
            assert self.looks_ahead
            assert all(sequence.num_unread for sequence in self.scheduler.running.values())
            self.read()
            return self.step()
        if plan is None:
            assert not self.scheduler.has_work
            return None
        self.steps += 1
        preempted = before.keys() - self.scheduler.running.keys()
        self.preemptions += len(preempted)
        self.check(plan, before, preempted)
        following = self.model.run(plan, self.pool)
        self.read()
        self.unread = [
            (self.sequences[key], token_id) for key, token_id in following.items() if key in self.scheduler.running
        ]
        self.pool |= {sequence.pool_place: token_id for sequence, token_id in self.unread}
        self.scheduler.advance(plan, [sequence for sequence, _ in self.unread])
        for sequence in list(self.scheduler.running.values()):
            if sequence.request.score and sequence.num_uncomputed == 0:
                self.scheduler.finish(sequence, "length")
        if not self.looks_ahead:
            self.read()
        self.scheduler.check_integrity()
        return plan

    def read(self) -> None:
        for sequence in self.scheduler.update(self.unread):
            if sequence.num_generated == sequence.request.params.max_new_tokens:
                self.scheduler.finish(sequence, "length")
        self.unread = []

    def step_until(self, condition: Callable[[], bool]) -> Plan:
        """The plan of the step after which `condition` holds."""
        while True:
            plan = self.step()
            assert plan is not None, "all work ended first"
            if condition():
                return plan

    def check(self, plan: Plan, before: dict[int, int], preempted: set[int]) -> None:
        keys = [chunk.key for chunk in plan.chunks]
        ending = [
            sequence
            for sequence in self.sequences
            if sequence.num_unread and sequence.is_complete(1024) and sequence.status is Status.RUNNING
        ]
        running = [key for key, sequence in self.scheduler.running.items() if sequence not in ending]
        assert keys == sorted(keys) == running, "each running sequence that goes on has one chunk, oldest first"
        assert len(keys) <= self.config.max_batch_size
        assert sum(chunk.length for chunk in plan.chunks) <= self.config.max_step_tokens
        places = [sequence.pool_place for sequence in self.scheduler.running.values()]
        assert len({*places}) == len(places), "each has its own place in the token pool"
        live = [
            sequence.arrival
            for sequence in self.sequences
            if sequence.status is not Status.FINISHED and sequence not in ending
        ]
        assert keys == live[: len(keys)], "the oldest are served"
        assert not preempted or set(keys) <= before.keys(), "none is admitted beside a preemption"
        for chunk in plan.chunks:
            sequence = self.sequences[chunk.key]
            if chunk.key in before:
                assert chunk.start == before[chunk.key], "positions follow each other"
            else:
                assert chunk.start % self.blocks.block_size == 0, "it starts at zero or after full blocks"
            assert chunk.length > 0
            assert list(chunk.token_ids) == sequence.token_ids[chunk.start : chunk.end]
            assert chunk.unread == (sequence.pool_place,) * (chunk.end > len(sequence.token_ids))
            blocks = -(-chunk.end // self.config.block_size)
            assert len(chunk.block_table) == blocks, "blocks are taken for the chunk only"
            reaches_end = chunk.end == sequence.num_tokens
            assert chunk.logits == ("all" if sequence.request.score else "last" if reaches_end else "none")

    def drain(self) -> None:
        """Run to the end, in no more steps than serving one sequence after another would take."""
        limit = self.steps + sum(
            len(sequence.token_ids) + (sequence.request.params.max_new_tokens or 0) for sequence in self.sequences
        )
        while self.step():
            assert self.steps <= limit, "livelock"
        assert self.blocks.num_free == self.blocks.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
