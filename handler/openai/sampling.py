"""Owns the fields that say how tokens are chosen.

OpenAI's defaults hold here, not those of model-config.yaml. Knows no prompt and no reply.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from handler.openai.fields import Body, only
from llama2.engine.sampling_params import SamplingParams


def _ids_as_keys(biases: dict[str, float]) -> dict[str, float]:
    for key in biases:
        if not (key.isascii() and key.isdecimal()):
            raise PydanticCustomError("value", "must map token ids to numbers, got the key {key}", {"key": repr(key)})
    return biases


Biases = Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], AfterValidator(_ids_as_keys)]


class SamplingFields(Body):
    """vLLM's extras last. What is Any here is checked by `SamplingParams`, as every other API's fields are."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    stop: Any = ()
    seed: Any = None
    logit_bias: Biases = Field(default_factory=dict)
    presence_penalty: Any = 0.0
    frequency_penalty: Any = 0.0

    top_k: Any = 0
    min_p: Any = 0.0
    repetition_penalty: Any = 1.0
    min_tokens: Any = 0
    ignore_eos: bool = False
    stop_token_ids: Any = ()
    skip_special_tokens: Annotated[Any, only(True, why="special tokens are never part of a reply's text")] = True

    @property
    def biases(self) -> dict[int, float]:
        """By token id."""
        return {int(key): bias for key, bias in self.logit_bias.items()}

    def sampling_params(self, *, max_new_tokens: int | None, logprobs: int | None, n: int) -> SamplingParams:
        """Raises InvalidValue: a field is wrong."""
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            # Zero keeps the likeliest token alone, as the smallest number above it does.
            top_p=max(self.top_p, sys.float_info.min),
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            logit_bias=self.biases,
            n=n,
        )
