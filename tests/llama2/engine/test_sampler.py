"""The outside reference for penalties and filters is transformers; for the draw, the inverse of the distribution."""

import math
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llama2.engine import nucleus
from llama2.engine import sampler as sampler_module
from llama2.engine.sampler import Sampler
from llama2.engine.sequence import Sequence
from tests.support.sampling import FILTERS, MIXED, PENALTIES, PLAIN, make_logits, make_sequence, sample_ids


def reference_distribution(logits_V: torch.Tensor, sequence: Sequence) -> torch.Tensor:
    """The probabilities of transformers' own processors, in its order, with OpenAI's formula for what it lacks."""
    params = sequence.request.params
    scores = logits_V.clone()
    repetition = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    scores = repetition(torch.tensor([sequence.token_ids]), scores[None])[0]
    for token_id in set(sequence.token_ids[sequence.num_prompt :]):
        count = sequence.token_ids[sequence.num_prompt :].count(token_id)
        scores[token_id] -= count * params.frequency_penalty + params.presence_penalty
    warpers: list[Any] = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    for warper in warpers:
        scores = warper(torch.tensor([sequence.token_ids]), scores.view(1, -1))
    return scores[0].double().softmax(-1)


@pytest.mark.parametrize("vocab_size", [20, 300, 3000])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 64},
        {"top_k": 1500},
        {"top_p": 0.05},
        {"top_p": 0.5},
        {"top_p": 0.99},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.8},
        {"frequency_penalty": -0.8},
        {"top_k": 30, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05},
        FILTERS,
        {**FILTERS, **PENALTIES, "temperature": 0.6},
    ],
    ids=str,
)
def test_the_draw_inverts_the_distribution_of_transformers(
    monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], scale: float, vocab_size: int
) -> None:
    """At 200 even steps through (0, 1), which together see every token of more than half a percent."""
    steps = [(step + 0.5) / 200 for step in range(200)]
    logits_V = make_logits(1, vocab_size, scale=scale)[0]
    likely = logits_V.topk(12).indices.tolist()
    sequences = [
        make_sequence(arrival, prompt=likely[:8], generated=likely[4:] + likely[-3:], **{**PLAIN, **params})
        for arrival in range(len(steps))
    ]
    monkeypatch.setattr(Sampler, "_uniform", lambda _, sequence: steps[sequence.arrival])
    tokens = sample_ids(logits_V.expand(len(steps), -1), sequences)
    probabilities = reference_distribution(logits_V, sequences[0])
    cumulative = probabilities.cumsum(-1)
    for step, token in zip(steps, tokens, strict=True):
        assert probabilities[token] > 0
        # Rounding may move an edge between two tokens, by as much as single precision has.
        assert cumulative[token] - probabilities[token] - 1e-5 <= step <= cumulative[token] + 1e-5


def test_draws_have_the_frequencies_of_their_probabilities() -> None:
    """Chi-square over requests with their own seeds, at the 0.1 % point for 5 degrees of freedom."""
    logits_V = torch.tensor([2.0, 1.0, 0.0, 1.5, -1.0, 0.5])
    sequences = [make_sequence(arrival, **PLAIN) for arrival in range(20_000)]
    counts = torch.bincount(torch.tensor(sample_ids(logits_V.expand(20_000, -1), sequences)), minlength=6)
    expected = 20_000 * logits_V.softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5


def test_successive_draws_of_one_request_are_independent() -> None:
    """Chi-square of the pairs of neighbours in one request's stream, at the 0.1 % point for 15 degrees of freedom."""
    sequences = [make_sequence(generated=[0] * index, **PLAIN, seed=3) for index in range(4000)]
    tokens = torch.tensor(sample_ids(torch.zeros(4000, 4), sequences))
    pairs = torch.bincount(4 * tokens[:-1] + tokens[1:], minlength=16)
    assert ((pairs - 3999 / 16) ** 2 / (3999 / 16)).sum() < 37.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_temperature_0_is_the_lowest_likeliest_id_whatever_else_is_asked(dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 300, dtype=dtype)
    logits[0, [250, 17, 40]] = 4
    params: dict[str, Any] = {"temperature": 0.0, "top_p": 0.1, "top_k": 5, "min_p": 0.5, "seed": 1}
    assert sample_ids(logits, [make_sequence(0, **params), make_sequence(1, **params)]) == [17, 0]


def test_temperature_0_heeds_penalties() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    assert sample_ids(logits, [make_sequence(prompt=[0], temperature=0, repetition_penalty=1.2)]) == [1]
    assert sample_ids(logits, [make_sequence(prompt=[0], temperature=0, presence_penalty=1.0)]) == [0]
    assert sample_ids(logits, [make_sequence(prompt=[2], generated=[0], temperature=0, presence_penalty=1.0)]) == [1]


def test_before_min_tokens_no_end_is_chosen_whatever_its_bias() -> None:
    """Id 1 ends a text, id 2 this request."""
    sampler = Sampler(0, eos_ids=[1])
    logits = torch.tensor([[0.0, 9.0, 8.0, 1.0]])
    params: dict[str, Any] = {"temperature": 0, "stop_token_ids": (2,), "logit_bias": {1: 100.0, 3: -0.5}}
    assert sample_ids(logits, [make_sequence(**params, min_tokens=2)], sampler) == [3]
    assert sample_ids(logits, [make_sequence(generated=[0], **params, min_tokens=2)], sampler) == [3]
    assert sample_ids(logits, [make_sequence(generated=[0, 0], **params, min_tokens=2)], sampler) == [1]
    rows = [make_sequence(0, **params), make_sequence(1, **params, min_tokens=1), make_sequence(2, temperature=0)]
    assert sample_ids(logits.expand(3, -1), rows, sampler) == [1, 3, 1]


@pytest.mark.parametrize(
    "rows",
    [
        [{"temperature": 0.0}] * 3,
        [{}] * 3,
        [{"temperature": 0.0}, {"top_k": 5}, {"min_p": 0.1, "repetition_penalty": 1.3, "logit_bias": {3: 1.0}}],
    ],
)
def test_the_host_waits_for_a_gpu_when_it_reads_and_not_before(
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]
) -> None:
    """Every number that it asks of a tensor would be a wait; it asks for the ids, and for nothing else."""
    # A GPU's search for the nucleus is a kernel; here any floor that reads no number stands in for it.
    monkeypatch.setattr(sampler_module, "nucleus_floor", lambda weights_NV, *_: weights_NV.amax(dim=-1) / 2)
    asked: list[str] = []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, name: str = name, original: Any = original) -> Any:
            asked.append(name)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    logits = make_logits(3, 3000)
    logits[:, 5] = 40.0
    choice = Sampler(0).sample(logits, [make_sequence(row, **params) for row, params in enumerate(rows)])
    assert asked == []
    choice.read()
    assert asked == ["tolist"]


def test_what_was_chosen_stays_when_the_logits_are_overwritten() -> None:
    """The next step may write into them before anybody reads."""
    logits = make_logits(len(MIXED), 2000)
    sequences = [make_sequence(row, **params) for row, params in enumerate(MIXED)]
    expected = Sampler(0).sample(logits, sequences).read()
    choice = Sampler(0).sample(logits, sequences)
    logits.fill_(torch.nan)
    assert choice.read() == expected


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    sampler, logits = Sampler(0), make_logits(len(MIXED), 2000, scale=1.0)
    logits = logits.bfloat16()  # has many ties
    sequences = [make_sequence(row, generated=[5, 6, 6], **params) for row, params in enumerate(MIXED)]
    together = sampler.sample(logits, sequences).read()
    assert [sampler.sample(logits[row : row + 1], [one]).read()[0] for row, one in enumerate(sequences)] == together
    assert sampler.sample(logits.flip(0), sequences[::-1]).read() == together[::-1]


def test_the_callers_logits_are_not_changed() -> None:
    logits = make_logits(len(MIXED), 2000)
    before = logits.clone()
    Sampler(0).sample(logits, [make_sequence(row, **params) for row, params in enumerate(MIXED)]).read()
    assert torch.equal(logits, before)


def test_what_rounding_puts_on_a_token_that_is_ruled_out_becomes_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama2.engine.sampler._invert", lambda weights, uniform: torch.tensor([0, 2]))
    logits = torch.tensor([[-math.inf, 1.0, 2.0, 0.0]]).expand(2, -1)
    assert sample_ids(logits, [make_sequence(row, **PLAIN) for row in range(2)]) == [2, 2]


@pytest.mark.parametrize("params", [PLAIN, {"temperature": 100.0, "top_p": 0.99}, {"temperature": 0.5, "top_k": 40}])
@pytest.mark.parametrize("uniform", [2.0**-53, 1 - 2.0**-53])
def test_a_token_of_probability_0_is_never_drawn(
    monkeypatch: pytest.MonkeyPatch, uniform: float, params: dict[str, Any]
) -> None:
    """At the extremes of the range, where the ends of the vocabulary are impossible and rounding would fall there."""
    monkeypatch.setattr(Sampler, "_uniform", lambda *_: uniform)
    logits = make_logits(100, 512)
    logits[:, :5] = -math.inf
    logits[:50, 300:] = -math.inf
    tokens = sample_ids(logits, [make_sequence(row, **params) for row in range(100)])
    assert all(logits[row, token] > -math.inf for row, token in enumerate(tokens))


def test_a_top_k_beyond_the_vocabulary_is_no_filter() -> None:
    logits = make_logits(1, 100)
    draws = [sample_ids(logits, [make_sequence(seed=1, top_k=top_k)]) for top_k in (0, 100, 101, 2**31 - 1)]
    assert draws == [draws[0]] * 4


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38, 1e-6])
@pytest.mark.parametrize("top_p", [1e-300, 0.9, 1.0])
def test_a_temperature_near_0_is_greedy_and_overflows_nothing(temperature: float, top_p: float) -> None:
    logits = make_logits(3, 200, scale=50)
    sequences = [make_sequence(row, temperature=temperature, top_p=top_p) for row in range(3)]
    assert sample_ids(logits, sequences) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("repetition_penalty", [5e-324, 1e-38])
def test_an_extreme_repetition_penalty_is_no_fault_of_the_model(repetition_penalty: float) -> None:
    """It lifts both positive logits beyond single precision, where they are equal."""
    logits = torch.tensor([[0.0, 8.0, -1.0, 20.0]]).expand(50, -1)
    sequences = [make_sequence(row, prompt=range(4), repetition_penalty=repetition_penalty) for row in range(50)]
    assert set(sample_ids(logits, sequences)) == {1, 3}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("filters", [{}, {"top_p": 1.0}, {"top_k": 70, "min_p": 0.1}])
def test_a_nan_or_infinity_is_an_error_that_names_the_request(
    bad: float, temperature: float, dtype: torch.dtype, filters: dict[str, Any]
) -> None:
    logits = make_logits(3, 3000).to(dtype)
    logits[1, 50] = bad
    sequences = [make_sequence(row, temperature=temperature, repetition_penalty=1.1, **filters) for row in range(3)]
    with pytest.raises(FloatingPointError, match="request 'r1'"):
        Sampler(0).sample(logits, sequences).read()
    logits[1] = -math.inf
    with pytest.raises(FloatingPointError, match="request 'r1'"):
        Sampler(0).sample(logits, sequences).read()


def test_logprobs_are_the_models_own_before_any_penalty_or_filter() -> None:
    logits = make_logits(1, 50)
    likely = logits[0].topk(10).indices.tolist()
    sequence = make_sequence(prompt=likely, temperature=0.3, top_k=1, repetition_penalty=9.0, logprobs=3)
    (sampled,) = Sampler(0).sample(logits, [sequence]).read()
    expected = logits[0].log_softmax(-1)
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_id == sampled.token_id
    assert sampled.logprobs.logprob == pytest.approx(expected[sampled.token_id].item())
    assert [token_id for token_id, _ in sampled.logprobs.top] == expected.topk(3).indices.tolist()
    assert [value for _, value in sampled.logprobs.top] == pytest.approx(expected.topk(3).values.tolist())
    assert sampled.token_id not in [token_id for token_id, _ in sampled.logprobs.top]


def test_logprobs_are_given_only_where_asked_and_equal_ones_in_order_of_id() -> None:
    sequences = [make_sequence(row, logprobs=number) for row, number in enumerate((None, 0, 20))]
    none, chosen_only, twenty = Sampler(0).sample(torch.zeros(3, 10), sequences).read()
    assert none.logprobs is None
    assert chosen_only.logprobs is not None
    assert twenty.logprobs is not None
    assert chosen_only.logprobs.top == ()
    assert chosen_only.logprobs.logprob == pytest.approx(-math.log(10))
    assert [token_id for token_id, _ in twenty.logprobs.top] == [*range(10)]


def test_equal_weights_stay_or_go_together() -> None:
    """As with transformers' top_k: a cut between equals would be wherever the device happens to sort it."""
    logits = torch.zeros(400, 300)
    logits[:, 100:200] = 5.0
    for params in ({"top_k": 3}, {"top_p": 0.2, "temperature": 1.0}):
        tokens = sample_ids(logits, [make_sequence(row, **params) for row in range(400)])
        assert {*tokens} <= {*range(100, 200)}
        assert len({*tokens}) > 80


@pytest.mark.parametrize("batch_size", [1, 4])
def test_warming_up_searches_a_nucleus_in_a_full_batch(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    shapes: list[torch.Size] = []

    def noted(weights_NV: torch.Tensor, top_k_N: torch.Tensor, top_p_N: torch.Tensor) -> torch.Tensor:
        shapes.append(weights_NV.shape)
        return nucleus.nucleus_floor(weights_NV, top_k_N, top_p_N)

    monkeypatch.setattr(sampler_module, "nucleus_floor", noted)
    sampler_module.warm_up(300, batch_size, torch.device("cpu"))
    assert (batch_size, 300) in shapes


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    logits = make_logits(len(MIXED) * 20, 32_000)
    sequences = [make_sequence(row, generated=[5, 6, 6], **MIXED[row % len(MIXED)]) for row in range(len(logits))]
    assert sample_ids(logits.cuda(), sequences) == sample_ids(logits, sequences)
