import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from llama2.engine.sampling_params import MAX_INT, MAX_LOGPROBS, MAX_STOP_LENGTH, MAX_STOPS, SamplingParams
from llama2.engine.sequence import Request, Sequence, Status
from llama2.errors import InvalidValue, shown

LEGAL: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": None},
    {"max_new_tokens": 1},
    {"max_new_tokens": 5, "min_tokens": 5},
    {"max_new_tokens": None, "min_tokens": 500},
    {"temperature": 0},
    {"temperature": 100.0},
    {"top_p": 1},
    {"top_p": 1e-9},
    {"top_k": 0},
    {"top_k": 10**9},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"repetition_penalty": 0.01},
    {"presence_penalty": -2.0},
    {"frequency_penalty": 2},
    {"seed": None},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"stop": ("a", "\n")},
    {"stop_token_ids": (0, 5)},
    {"ignore_eos": True},
    {"logprobs": None},
    {"logprobs": 0},
    {"logprobs": MAX_LOGPROBS},
]

ILLEGAL: list[tuple[str, list[Any], str]] = [
    ("max_new_tokens", [0, -1, 1.0, "5", True, MAX_INT + 1], f"an integer from 1 to {MAX_INT}"),
    ("min_tokens", [-1, 1.0, "5", None, True], f"an integer from 0 to {MAX_INT}"),
    ("temperature", [-0.1, 100.5, math.nan, math.inf, "1", None, True], "a number in [0, 100]"),
    ("top_p", [0, 0.0, -0.5, 1.01, math.nan, "x", None, True], "a number in (0, 1]"),
    ("top_k", [-2, 1.5, None, "3", False], f"an integer from -1 to {MAX_INT}"),
    ("min_p", [-0.1, 1.1, math.nan, None], "a number in [0, 1]"),
    ("repetition_penalty", [0, -1.0, 101, math.inf, None], "a number in (0, 100]"),
    ("presence_penalty", [-2.1, 2.1, math.nan, None], "a number in [-2, 2]"),
    ("frequency_penalty", [-2.1, 2.1, 10**400, "0", None], "a number in [-2, 2]"),
    ("seed", [2**63, -(2**63) - 1, 1.5, "1", True], f"an integer from {-(2**63)} to {2**63 - 1}"),
    ("stop", ["", ["a", ""], ("a", ""), (1,), 5, None], "at most 64 strings of 1 to 1000 characters"),
    ("stop_token_ids", ["12", None, 5], "a list of token ids"),
    ("stop_token_ids", [(-1,), ("1",), (1.0,)], f"an integer from 0 to {MAX_INT}"),
    ("ignore_eos", [1, "true", None], "true or false"),
    ("logprobs", [-1, MAX_LOGPROBS + 1, True, 1.0], f"an integer from 0 to {MAX_LOGPROBS}"),
    ("n", [0, 1.0, None], f"an integer from 1 to {MAX_INT}"),
]


NUMBERS = [
    "max_new_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
]
NUMBERS += ["frequency_penalty", "seed", "logprobs"]


@pytest.mark.parametrize("fields", LEGAL, ids=str)
def test_what_is_in_range_is_kept_as_it_is(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert all(getattr(params, name) == value for name, value in fields.items())


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, values, allowed in ILLEGAL for value in values],
)
def test_what_is_out_of_range_is_refused_with_its_field_value_and_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert caught.value.field == name
    assert message.startswith(f"{name} must be {allowed}")
    culprit = value[0] if isinstance(value, tuple) and name == "stop_token_ids" else value
    assert message.endswith(f"got {shown(culprit)}")


def test_stop_strings_are_limited_in_number_and_in_length() -> None:
    SamplingParams(stop=("x" * MAX_STOP_LENGTH,) * MAX_STOPS)
    for stop in (("x",) * (MAX_STOPS + 1), ("x" * (MAX_STOP_LENGTH + 1),)):
        with pytest.raises(InvalidValue, match=r"^stop must be at most 64 strings of 1 to 1000 characters"):
            SamplingParams(stop=stop)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308])
def test_a_number_too_large_for_a_float_is_a_users_mistake(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name


def test_a_reply_cannot_have_to_be_longer_than_it_may() -> None:
    SamplingParams(min_tokens=129)
    with pytest.raises(InvalidValue, match="min_tokens must be at most 128, the limit, got 129"):
        SamplingParams(min_tokens=129, max_new_tokens=128)


def test_params_and_requests_are_immutable_and_compare_by_value() -> None:
    params = SamplingParams(stop=("a",))
    assert params == SamplingParams(stop=("a",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 2.0  # type: ignore[misc]


def test_a_sequence_counts_what_is_prompt_generated_and_not_yet_computed() -> None:
    request = Request(request_id="r", prompt_ids=(4, 5, 6))
    sequence = Sequence.of(request, 0)
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_uncomputed) == (3, 0, 3)
    assert sequence.status is Status.WAITING
    sequence.num_computed = 3
    sequence.token_ids.append(7)
    assert (sequence.num_prompt, sequence.num_generated, sequence.num_uncomputed) == (3, 1, 1)
    assert request.prompt_ids == (4, 5, 6)


def test_numbers_of_numpy_and_lists_become_plain_values() -> None:
    given: dict[str, Any] = {
        "max_new_tokens": np.int64(5),
        "temperature": np.float32(0.5),
        "top_k": np.int32(3),
        "stop": "END",
        "stop_token_ids": np.array([2, 3]),
        "logit_bias": {np.int64(4): np.float32(1.5)},
    }
    plain: dict[str, Any] = {
        "max_new_tokens": 5,
        "temperature": 0.5,
        "top_k": 3,
        "stop": ("END",),
        "stop_token_ids": (2, 3),
        "logit_bias": {4: 1.5},
    }
    params = SamplingParams(**given)
    assert params == SamplingParams(**plain)
    numbers = (params.max_new_tokens, params.temperature, params.top_k, *params.stop_token_ids, *params.logit_bias)
    assert [type(number) for number in numbers] == [int, float, int, int, int, int]


def test_top_k_of_minus_one_is_off_and_max_tokens_a_second_name() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(max_tokens=5) == SamplingParams(max_new_tokens=5)  # type checkers know it, too
    assert SamplingParams(stop="a") == SamplingParams(stop=["a"]) == SamplingParams(stop=("a",))  # and these types
    with pytest.raises(InvalidValue, match=r"max_token is an unknown name: did you mean 'max_tokens'\?"):
        SamplingParams(max_token=5)  # type: ignore[call-arg]
