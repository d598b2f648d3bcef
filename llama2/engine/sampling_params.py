"""Owns how the tokens of a reply are chosen and when it ends, as a user says it.

Knows no torch, no request and no text.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llama2.errors import InvalidValue, shown
from llama2.names import SECOND_NAME, by_name

MAX_LOGPROBS = 20
MAX_INT = 2**31 - 1
MAX_STOPS = 64  # each is looked for at every character
MAX_STOP_LENGTH = 1000
# Of a bare completion that says nothing else, which may never end by itself.
COMPLETION_TOKENS = 128


@by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when they end; vLLM's `max_tokens` is a second name of `max_new_tokens`.

    The order is: logit_bias, grammar, penalties, temperature, top_k, top_p, min_p, draw. `temperature=0` is greedy,
    whatever the others are; `top_k` of 0 or -1 keeps all. `logit_bias` is added to the logits of the token ids it
    names. `logprobs=k` asks for the log-probabilities of the chosen token and the k most likely ones under the model's
    own distribution, before any of these. `max_new_tokens=None` means as many as fit into the engine's max_seq_len.
    Before there are `min_tokens`, neither an end of text nor one of `stop_token_ids` is chosen, except where a grammar
    says what follows. `n` replies are made of a prompt.

    A number may be numpy's, `stop` one string, and what is a tuple here any list: the fields hold plain values.

    Raises:
        InvalidValue: a field is unknown or out of range.
    """

    max_new_tokens: int | None = field(default=None, metadata={SECOND_NAME: "max_tokens"})
    min_tokens: int = 0
    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    n: int = 1
    if TYPE_CHECKING:  # what `by_name` makes the constructor take
        max_tokens: InitVar[int | None] = None

    def __post_init__(self, *_: object) -> None:
        plain: dict[str, Any] = {
            "temperature": _number("temperature", self.temperature, low=0.0, high=100.0),
            "top_p": _number("top_p", self.top_p, low=0.0, high=1.0, open_low=True),
            "top_k": max(0, integer("top_k", self.top_k, low=-1)),
            "min_p": _number("min_p", self.min_p, low=0.0, high=1.0),
            "repetition_penalty": _number(
                "repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, open_low=True
            ),
            "presence_penalty": _number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0),
            "frequency_penalty": _number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0),
            "stop": _stops(self.stop),
            "stop_token_ids": _ids("stop_token_ids", self.stop_token_ids),
            "logit_bias": _biases(self.logit_bias),
            "min_tokens": integer("min_tokens", self.min_tokens, low=0),
            "n": integer("n", self.n, low=1),
        }
        if self.max_new_tokens is not None:
            plain["max_new_tokens"] = integer("max_new_tokens", self.max_new_tokens, low=1)
            if plain["min_tokens"] > plain["max_new_tokens"]:
                raise InvalidValue(
                    "min_tokens", f"must be at most {self.max_new_tokens}, the limit, got {self.min_tokens}"
                )
        if self.seed is not None:
            plain["seed"] = integer("seed", self.seed, low=-(2**63), high=2**63 - 1)
        if self.logprobs is not None:
            plain["logprobs"] = integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise InvalidValue("ignore_eos", f"must be true or false, got {shown(self.ignore_eos)}")
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def with_completion_tokens(params: SamplingParams) -> SamplingParams:
    """The parameters of a bare completion: COMPLETION_TOKENS where they have no limit."""
    return params if params.max_new_tokens is not None else replace(params, max_new_tokens=COMPLETION_TOKENS)


def integer(name: str, value: Any, *, low: int, high: int = MAX_INT) -> int:
    """`value` as a plain int, or an InvalidValue that names the field."""
    is_integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_integer or not low <= value <= high:
        raise InvalidValue(name, f"must be an integer from {low} to {high}, got {shown(value)}")
    return int(value)


def _number(name: str, value: Any, *, low: float, high: float, open_low: bool = False) -> float:
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise InvalidValue(name, f"must be a number in {bracket}{low:g}, {high:g}], got {shown(value)}")
    return float(value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (tuple, list)) or len(texts) > MAX_STOPS or not all(map(_is_stop, texts)):
        raise InvalidValue(
            "stop", f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters, got {shown(value)}"
        )
    return tuple(texts)


def _is_stop(text: Any) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= MAX_STOP_LENGTH


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise InvalidValue(name, f"must be a list of token ids, got {shown(value)}")
    return tuple(integer(name, token_id, low=0) for token_id in value)


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidValue("logit_bias", f"must map token ids to numbers, got {shown(value)}")
    return {
        integer("logit_bias", token_id, low=0): _number("logit_bias", bias, low=-100.0, high=100.0)
        for token_id, bias in value.items()
    }
