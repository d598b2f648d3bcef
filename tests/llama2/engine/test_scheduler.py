"""The scheduler drives a fake model whose every token depends on every earlier one, read through a paged cache."""

import dataclasses
import pickle
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.config import EngineConfig
from llama2.engine.block_manager import BlockManager
from llama2.engine.scheduler import Chunk, Plan, Scheduler
from llama2.engine.sequence import Request, SamplingParams, Sequence, Status


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
            assert plan is not None, "all work ended before"
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
        assert len({*places}) == len(places), "each has a place of its own in the token pool"
        live = [
            sequence.arrival
            for sequence in self.sequences
            if sequence.status is not Status.FINISHED and sequence not in ending
        ]
        assert keys == live[: len(keys)], "the oldest are served"
        assert not preempted or set(keys) <= before.keys(), "nobody is admitted beside a preemption"
        for chunk in plan.chunks:
            sequence = self.sequences[chunk.key]
            if chunk.key in before:
                assert chunk.start == before[chunk.key], "positions follow each other"
            else:
                assert chunk.start % self.blocks.block_size == 0, "a start is after nothing, or after full blocks"
            assert chunk.length > 0
            assert list(chunk.token_ids) == sequence.token_ids[chunk.start : chunk.end]
            assert chunk.unread == (sequence.pool_place,) * (chunk.end > len(sequence.token_ids))
            blocks = -(-chunk.end // self.config.block_size)
            assert len(chunk.block_table) == blocks, "blocks are taken for the chunk only"
            reaches_end = chunk.end == sequence.num_tokens
            assert chunk.logits == ("all" if sequence.request.score else "last" if reaches_end else "none")

    def drain(self) -> None:
        """Run to the end, within the number of steps in which the oldest sequence alone would have been through."""
        limit = self.steps + sum(
            len(sequence.token_ids) + (sequence.request.params.max_new_tokens or 0) for sequence in self.sequences
        )
        while self.step():
            assert self.steps <= limit, "livelock"
        assert self.blocks.num_free == self.blocks.num_blocks
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0


def shape(plan: Plan | None) -> list[tuple[int, int, int]]:
    """The (key, start, length) of each chunk."""
    assert plan is not None
    return [(chunk.key, chunk.start, chunk.length) for chunk in plan.chunks]


def test_a_request_is_prefilled_then_decoded() -> None:
    trial = Trial()
    sequence = trial.add(5, max_new_tokens=3)
    assert [shape(trial.step()) for _ in range(3)] == [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)]]
    assert sequence.status is Status.FINISHED
    assert sequence.finish_reason == "length"
    assert sequence.token_ids == expected_tokens(sequence)
    assert trial.step() is None


def test_decodes_come_first_and_a_long_prompt_takes_what_is_left() -> None:
    trial = Trial(max_step_tokens=8)
    trial.add(4, max_new_tokens=9)
    trial.add(20)
    trial.add(2)
    assert shape(trial.step()) == [(0, 0, 4), (1, 0, 4)]
    assert shape(trial.step()) == [(0, 4, 1), (1, 4, 7)]
    assert shape(trial.step()) == [(0, 5, 1), (1, 11, 7)]
    assert shape(trial.step()) == [(0, 6, 1), (1, 18, 2), (2, 0, 2)]
    assert shape(trial.step()) == [(0, 7, 1), (1, 20, 1), (2, 2, 1)]


def test_only_the_chunk_that_reaches_the_end_asks_for_logits() -> None:
    trial = Trial(max_step_tokens=4)
    trial.add(10)
    assert [trial.step().chunks[0].logits for _ in range(4)] == ["none", "none", "last", "last"]  # type: ignore[union-attr]


def test_a_scored_prompt_asks_for_all_logits_and_gains_no_token() -> None:
    trial = Trial(max_step_tokens=4)
    sequence = trial.add(10, score=True)
    assert [trial.step().chunks[0].logits for _ in range(3)] == ["all"] * 3  # type: ignore[union-attr]
    assert sequence.status is Status.FINISHED
    assert sequence.num_generated == 0


def test_requests_join_as_soon_as_one_leaves() -> None:
    trial = Trial(max_batch_size=2)
    trial.add(3, max_new_tokens=1)
    trial.add(3, max_new_tokens=4)
    trial.add(3)
    assert shape(trial.step()) == [(0, 0, 3), (1, 0, 3)]
    assert shape(trial.step()) == [(1, 3, 1), (2, 0, 3)]


def test_the_youngest_is_preempted_and_recomputed_with_its_own_tokens() -> None:
    """4 blocks of 4: both prompts fit, but not both at 9 tokens."""
    trial = Trial(num_blocks=4)
    old, young = trial.add(6, max_new_tokens=8), trial.add(6, max_new_tokens=8)
    plan = trial.step_until(lambda: trial.preemptions == 1)
    assert shape(plan) == [(0, 8, 1)]
    assert (young.status, young.num_computed, list(young.block_table)) == (Status.WAITING, 0, [])
    assert young.num_generated == 3
    trial.drain()
    assert old.token_ids == expected_tokens(old)
    assert young.token_ids == expected_tokens(young)
    assert young.num_generated == 8


def test_a_preempted_request_goes_before_those_that_came_later() -> None:
    trial = Trial(num_blocks=4)
    for _ in range(3):
        trial.add(6, max_new_tokens=8)
    trial.step_until(lambda: trial.preemptions == 1)
    trial.step_until(lambda: trial.scheduler.num_running == 0)
    assert [key for key, _, _ in shape(trial.step())] == [1]


def test_several_are_preempted_for_one_and_keep_their_order() -> None:
    trial = Trial(num_blocks=6, max_batch_size=6, max_step_tokens=24)
    for _ in range(6):
        trial.add(4, max_new_tokens=9)
    trial.step()
    assert trial.blocks.num_free == 0
    assert shape(trial.step()) == [(0, 4, 1), (1, 4, 1), (2, 4, 1)]
    assert list(trial.scheduler._waiting) == [3, 4, 5]
    trial.drain()


def test_a_long_prompt_is_not_started_before_all_of_it_would_fit() -> None:
    """Else it would be prefilled in vain, again and again, while the older request fills the cache."""
    trial = Trial(num_blocks=8, max_step_tokens=4)
    old, long = trial.add(4, max_new_tokens=20), trial.add(29)
    trial.step_until(lambda: long.num_computed > 0 or old.status is Status.FINISHED)
    assert long.num_computed == 0
    trial.drain()
    assert trial.preemptions == 0


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_abort_frees_a_request_wherever_it_is(steps: int) -> None:
    """After 0 steps it waits, after 1 it is being prefilled, after 2 it decodes."""
    trial = Trial(max_step_tokens=8)
    sequence = trial.add(10)
    for _ in range(steps):
        trial.step()
    assert trial.scheduler.abort("r0") == [sequence]
    assert (sequence.status, sequence.finish_reason, list(sequence.block_table)) == (Status.FINISHED, "abort", [])
    assert trial.blocks.num_free == trial.blocks.num_blocks
    assert not trial.scheduler.has_work
    assert trial.scheduler.schedule() is None
    assert trial.scheduler.abort("r0") == []


def test_update_skips_a_request_that_was_aborted_since_it_was_planned() -> None:
    trial = Trial()
    gone, stays = trial.add(3), trial.add(3)
    plan = trial.scheduler.schedule()
    assert plan is not None
    trial.scheduler.abort("r0")
    trial.scheduler.advance(plan, [stays])
    assert gone.token_ids == list(gone.request.prompt_ids)
    assert stays.num_unread == 1
    assert trial.scheduler.update([(stays, 8)]) == [stays]
    assert (stays.token_ids[-1], stays.num_unread) == (8, 0)
    trial.scheduler.check_integrity()


def test_a_request_id_is_refused_while_its_first_owner_lives_and_free_afterwards() -> None:
    trial = Trial()
    first = trial.add(3)
    twin = Sequence.of(first.request, 1)
    with pytest.raises(ValueError, match=r"request_id .* 'r0'"):
        trial.scheduler.add(twin)
    trial.scheduler.abort("r0")
    trial.scheduler.add(twin)
    assert trial.scheduler.num_waiting == 1


def test_a_request_that_can_never_fit_ends_the_engine_instead_of_turning_for_ever() -> None:
    trial = Trial(num_blocks=2, max_step_tokens=8)
    trial.add(6, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="'r0' of 9 tokens does not fit into the empty KV cache of 2 blocks of 4"):
        trial.drain()


def test_a_plan_is_immutable() -> None:
    trial = Trial()
    trial.add(3)
    plan = trial.step()
    assert plan is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.copies = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        plan.chunks[0].start = 1  # type: ignore[misc]
    tables = [list(chunk.block_table) for chunk in plan.chunks]
    trial.drain()
    assert [list(chunk.block_table) for chunk in plan.chunks] == tables, "it keeps no list that goes on changing"


def test_a_plan_arrives_on_other_ranks_as_it_was_sent() -> None:
    """Also one that copies blocks, prefills and decodes at once."""
    trial = Trial(num_blocks=20, max_step_tokens=8)
    trial.add(4, max_new_tokens=9)
    trial.add(20, score=True)
    trial.step()
    plan = trial.scheduler.schedule()
    assert plan is not None
    plan = dataclasses.replace(plan, copies=((1, 2), (3, 4)))
    assert {chunk.logits for chunk in plan.chunks} == {"last", "all"}
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_ten_thousand_waiting_requests_do_not_slow_a_step() -> None:
    def seconds(num_waiting: int) -> float:
        trial = Trial(num_blocks=1024)
        for _ in range(4 + num_waiting):
            trial.add(2, max_new_tokens=1000)
        trial.step()
        best = float("inf")
        for _ in range(20):
            start = time.perf_counter()
            trial.scheduler.abort(f"r{len(trial.sequences) - 1}")
            trial.add(2)
            trial.scheduler.schedule()
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(10_000) < 10 * seconds(10) + 1e-3


Event = tuple[str, int, int]

ADD = st.tuples(st.just("add"), st.integers(4, 24), st.integers(4, 16))

# Mostly additions that run to their full length: else the pool is rarely short of blocks.
EVENTS = st.lists(
    st.one_of(
        ADD,
        ADD,
        ADD,
        st.tuples(st.just("score"), st.integers(1, 40), st.just(1)),
        st.tuples(st.just("step"), st.integers(1, 8), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("stop"), st.integers(0, 20), st.just(0)),
    ),
    min_size=6,
    max_size=40,
)


def play(trial: Trial, events: list[Event]) -> list[Sequence]:
    """Let requests come, leave and end by a stop token at random times, then run the rest to its end."""
    for name, first, second in events:
        if name in ("add", "score"):
            trial.add(first, second, score=name == "score")
        elif name == "step":
            for _ in range(first):
                trial.step()
        elif name == "abort":
            trial.scheduler.abort(f"r{first}")
        elif first in trial.scheduler.running:
            trial.scheduler.finish(trial.sequences[first], "stop")
    trial.drain()
    return trial.sequences


@settings(deadline=None, derandomize=True, max_examples=600)
@given(
    events=EVENTS,
    block_size=st.sampled_from([1, 3, 4, 16]),
    spare_blocks=st.integers(0, 6),
    max_batch_size=st.integers(2, 6),
    spare_tokens=st.integers(0, 40),
    families=st.sampled_from([1, 2, 1000]),
    prefix_cache=st.booleans(),
    looks_ahead=st.booleans(),
)
def test_every_request_ends_with_the_tokens_it_would_have_alone(
    events: list[Event],
    block_size: int,
    spare_blocks: int,
    max_batch_size: int,
    spare_tokens: int,
    families: int,
    prefix_cache: bool,
    looks_ahead: bool,
) -> None:
    """Whatever comes and goes, whoever shares a prefix, with the prefix cache or without, whether tokens are read
    before the next step is planned or after, and however small the pool: from one longest request on."""
    trial = Trial(
        num_blocks=-(-40 // block_size) + spare_blocks,
        block_size=block_size,
        max_batch_size=max_batch_size,
        max_step_tokens=max_batch_size + spare_tokens,
        families=families,
        prefix_cache=prefix_cache,
        looks_ahead=looks_ahead,
    )
    for sequence in play(trial, events):
        assert sequence.status is Status.FINISHED
        assert sequence.token_ids == expected_tokens(sequence)
        if sequence.finish_reason == "length" and not sequence.request.score:
            assert sequence.num_unread == 0
            assert sequence.num_generated == sequence.request.params.max_new_tokens


def test_a_small_pool_gives_the_tokens_of_a_large_one() -> None:
    """The random traces above do preempt: this one does so many times, and loses nothing."""
    events: list[Event] = [("add", 5 + index % 7, 10) for index in range(30)]
    small, large = Trial(num_blocks=6), Trial(num_blocks=1000)
    small_ids, large_ids = ([sequence.token_ids for sequence in play(trial, events)] for trial in (small, large))
    assert small.preemptions > 10
    assert large.preemptions == 0
    assert small_ids == large_ids


def test_prefixes_that_requests_share_are_computed_once() -> None:
    trial = Trial(num_blocks=200, max_batch_size=8, max_step_tokens=64, families=1)
    for _ in range(5):
        trial.add(33)
        trial.drain()
    assert (trial.scheduler.num_prompt_tokens, trial.scheduler.num_cached_tokens) == (5 * 33, 4 * 32)
    assert all(sequence.token_ids == expected_tokens(sequence) for sequence in trial.sequences)


def test_a_request_counts_as_cached_what_it_found_and_not_what_it_computed_itself_before_a_preemption() -> None:
    trial = Trial(max_step_tokens=64, families=1)
    first, second = trial.add(33, 10), trial.add(41, 10)
    trial.step()
    trial.scheduler.preempt_all()
    trial.drain()
    third = trial.add(41, 10)
    trial.drain()
    assert [sequence.num_cached for sequence in (first, second, third)] == [0, 0, 40]


def test_a_preempted_request_goes_on_from_the_blocks_that_nobody_took_meanwhile() -> None:
    trial = Trial(max_step_tokens=64)
    sequence = trial.add(33, 10)
    trial.step()
    trial.scheduler.preempt_all()
    assert (sequence.status, trial.blocks.num_free) == (Status.WAITING, trial.blocks.num_blocks)
    plan = trial.step()
    assert plan is not None
    assert [(chunk.start, chunk.length) for chunk in plan.chunks] == [(32, 2)]
    trial.drain()
    assert sequence.token_ids == expected_tokens(sequence)
