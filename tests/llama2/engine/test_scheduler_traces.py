"""Whatever comes and goes, a request ends with the tokens that it would have alone."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.engine.sequence import Sequence, Status
from tests.support.trial import Trial, expected_tokens

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
    """Whatever comes, goes or shares a prefix, with the prefix cache or without, whether tokens are read
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
