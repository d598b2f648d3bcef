"""Owns the fields that say how tokens are chosen.

OpenAI's defaults hold here, not those of model-config.yaml. Knows no prompt and no reply.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError

from handler.openai.fields import Body, TokenId, by_kind, only
from llama2.engine.sampling_params import MAX_INT, SamplingParams


def _ids_as_keys(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal()):
            raise PydanticCustomError("value", "must map token ids to numbers, got the key {key}", {"key": repr(key)})
    return biases


Penalty = Annotated[float, Field(ge=-2, le=2)]
Stops = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Tag("texts")], by_kind("a string or a list of strings")
]
Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_ids_as_keys)]


class SamplingFields(Body):
    """vLLM's extras last."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stop: Stops = Field(default_factory=list)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: Biases = Field(default_factory=dict)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0

    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] = 0
    ignore_eos: bool = False
    stop_token_ids: list[TokenId] = Field(default_factory=list)
    skip_special_tokens: Annotated[Any, only(True, why="special tokens are never part of a reply's text")] = True

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def sampling_params(self, *, max_new_tokens: int | None, logprobs: int | None, n: int) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            # Zero keeps the likeliest token alone, as the smallest number above it does.
            top_p=max(self.top_p, sys.float_info.min),
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=self.biases,
            n=n,
        )
