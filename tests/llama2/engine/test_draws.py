"""What a draw depends on: its request's seed and position, and nothing else."""

from __future__ import annotations

import hashlib

import pytest
import torch

from llama2.engine.sampler import Sampler
from llama2.engine.sequence import Sequence
from tests.support.sampling import PLAIN, make_sequence, sample_ids


def stream(sequence: Sequence, sampler: Sampler, *, length: int = 20) -> list[int]:
    """The tokens of one request that is sampled from equal logits until it has `length` of them."""
    while sequence.num_generated < length:
        sequence.token_ids += sample_ids(torch.zeros(1, 1000), [sequence], sampler)
    return sequence.token_ids[sequence.num_prompt :]


def test_a_request_with_a_seed_draws_the_same_from_every_engine_and_at_every_arrival() -> None:
    first = stream(make_sequence(0, **PLAIN, seed=7), Sampler(1))
    assert stream(make_sequence(9, **PLAIN, seed=7), Sampler(2)) == first
    assert stream(make_sequence(0, **PLAIN, seed=8), Sampler(1)) != first
    assert stream(make_sequence(0, **PLAIN, seed=-7), Sampler(1)) != first


def test_without_a_seed_the_engines_seed_decides_and_no_two_requests_draw_alike() -> None:
    first = stream(make_sequence(0, **PLAIN), Sampler(1))
    assert stream(make_sequence(0, **PLAIN), Sampler(1)) == first
    assert stream(make_sequence(1, **PLAIN), Sampler(1)) != first
    assert stream(make_sequence(0, **PLAIN), Sampler(2)) != first


def test_without_any_seed_two_engines_draw_differently() -> None:
    assert stream(make_sequence(**PLAIN), Sampler()) != stream(make_sequence(**PLAIN), Sampler())


def test_a_draw_depends_on_nothing_but_seed_and_position() -> None:
    """Nor on what, if anything, was sampled before it: a recomputed request goes on where it was."""
    sampler = Sampler(0)
    whole = stream(make_sequence(**PLAIN), sampler)
    half = make_sequence(generated=whole[:10], **PLAIN)
    stream(make_sequence(1, **PLAIN), sampler)
    assert stream(half, sampler) == whole


def test_neither_the_prompt_nor_its_length_shifts_the_draws_of_a_seed() -> None:
    short, long = make_sequence(prompt=[1], **PLAIN, seed=7), make_sequence(prompt=range(90), **PLAIN, seed=7)
    assert stream(short, Sampler()) == stream(long, Sampler())


@pytest.mark.parametrize("digest", [b"\0" * 8, b"\xff" * 8])
def test_the_number_behind_a_draw_is_never_0_or_1(monkeypatch: pytest.MonkeyPatch, digest: bytes) -> None:
    class Extreme:
        def digest(self) -> bytes:
            return digest

    monkeypatch.setattr(hashlib, "blake2b", lambda *_, **__: Extreme())
    assert 0 < Sampler(0)._uniform(make_sequence()) < 1
