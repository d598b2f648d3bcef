"""What a step holds, who waits, who is preempted, and what a plan is."""

from __future__ import annotations

import dataclasses
import pickle
import time

import pytest

from llama2.engine.scheduler import Plan
from llama2.engine.sequence import Sequence, Status
from tests.support.trial import Trial, expected_tokens


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


def test_a_request_that_can_never_fit_ends_the_engine_instead_of_looping() -> None:
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
