"""Owns what completions, chats and responses have in common on the way in: fields, checks, and the generation of it.

Knows no endpoint's own fields and no reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field

from handler.adapters import Adapters
from handler.config import HandlerConfig
from handler.openai.constraints import ConstraintFields, Grammars
from handler.openai.fields import Body, only
from handler.openai.logprobs import TokenNames
from handler.openai.prompts import Encoded, PromptReader
from handler.openai.sampling import SamplingFields
from handler.prompt import Prompt
from llama2.adapters.reference import AdapterRef
from llama2.engine.limits import check_ids
from llama2.engine.sampling_params import MAX_INT, SamplingParams
from llama2.engine.sequence import Grammar
from llama2.errors import InvalidValue
from llama2.text.tokenizer import Tokenizer

MAX_N = 128
MAX_REPLIES = 1024  # of one call


class StreamOptions(Body):
    """The second is vLLM's."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[Any, only(False, why="chunks are not padded")] = None


class CommonFields(SamplingFields):
    """Those of completions, chats and responses."""

    model: str | None = None
    user: str | None = None
    stream: bool = False
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None

    # The native API's.
    adapter: Annotated[Any, only(why="the name of an adapter is given as model")] = None

    @property
    def never_ends(self) -> str | None:
        """The field that keeps a reply from its end, if there is one."""
        return "ignore_eos" if self.ignore_eos else "min_tokens" if self.min_tokens else None

    @property
    def is_cut(self) -> bool:
        """Does it say itself how much of its prompt to keep?"""
        return self.truncate_prompt_tokens is not None


class ChoicesBody(CommonFields, ConstraintFields):
    """The fields of completions and chats, vLLM's last."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] = 1
    stream_options: StreamOptions | None = None

    dry_run: bool = False

    def options(self) -> StreamOptions:
        """Raises InvalidValue: there are some, and no stream."""
        if self.stream_options is not None and not self.stream:
            raise InvalidValue("stream_options", "needs stream to be true")
        return self.stream_options or StreamOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What this server serves: the names it answers to, the first of which it calls itself; and a short hash of weights
    and settings."""

    names: tuple[str, ...]
    system_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One accepted body: what to generate, and how to name its reply. `n` replies are made of each prompt."""

    model: str
    adapter: AdapterRef | None
    system_fingerprint: str
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    n: int
    make_grammar: Callable[[], Grammar] | None
    user: str | None
    stream: bool
    stream_options: StreamOptions


@dataclass(frozen=True, kw_only=True)
class Model:
    """What bodies are checked against: one model and its server. `vocab_size` is the model's, which may have more ids
    than the tokenizer."""

    served: Served
    config: HandlerConfig
    tokenizer: Tokenizer
    vocab_size: int
    grammars: Grammars
    adapters: Adapters
    created: int

    @cached_property
    def prompts(self) -> PromptReader:
        return PromptReader(self.tokenizer, self.config)

    @cached_property
    def token_names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    def name(self, asked: str | None) -> str:
        """The model's name, or that of an adapter, as the client says it.

        Raises:
            RequestError: there is no such name (404).
        """
        self.adapter(asked)
        return asked or self.served.names[0]

    def adapter(self, asked: str | None) -> AdapterRef | None:
        """The adapter that a client means by its name, or by the model's and its own with a colon between them.

        Raises:
            RequestError: there is no such name (404).
        """
        if asked is None or asked in self.served.names:
            return None
        base, colon, rest = asked.partition(":")
        name = rest if colon and base in self.served.names else asked
        ref = self.adapters.find(name)
        if ref is None:
            names = [*self.served.names, *self.adapters.names]
            raise self.adapters.not_found("model", f"the model {asked!r} does not exist", name, names)
        return ref

    def check_new_name(self, name: str) -> None:
        """Raises InvalidValue: it is the model's own."""
        if name in self.served.names:
            raise InvalidValue("lora_name", f"{name} is the name of the base model")

    def describe(self, name: str) -> dict[str, Any]:
        """One of `models`."""
        ref = self.adapter(name)
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "torchserve",
            "root": self.served.names[0] if ref is None else self.adapters.place(ref),
            "parent": None if ref is None else self.served.names[0],
            "max_model_len": self.config.engine.max_seq_len,
        }

    def generation(
        self,
        body: CommonFields,
        encoded: Sequence[Encoded],
        *,
        n: int,
        max_tokens: int | None,
        default_max_tokens: int | None = None,
        logprobs: int | None,
        user: str | None,
        make_grammar: Callable[[], Grammar] | None,
        stream_options: StreamOptions | None = None,
    ) -> Generation:
        """A `max_tokens` that is given must fit in behind the prompt; 0 of them is one, which is then not generated.

        Raises:
            InvalidValue, RequestError: a field is wrong.
        """
        name = self.name(body.model)
        if n > self.config.engine.max_batch_size:
            raise InvalidValue("n", f"must be at most {self.config.engine.max_batch_size} on this server, got {n}")
        if n * len(encoded) > MAX_REPLIES:
            raise InvalidValue("prompt", f"asks for {n * len(encoded)} replies, but one call may have {MAX_REPLIES}")
        max_new_tokens = default_max_tokens if max_tokens is None else max(max_tokens, 1)
        params = body.sampling_params(max_new_tokens=max_new_tokens, logprobs=logprobs, n=n)
        for one in encoded:
            check_ids(one.place, one.ids, self.vocab_size)
        check_ids("stop_token_ids", params.stop_token_ids, self.vocab_size)
        check_ids("logit_bias", params.logit_bias, self.vocab_size)
        return Generation(
            model=name,
            adapter=self.adapter(body.model),
            system_fingerprint=self.served.system_fingerprint,
            prompts=tuple(
                self.prompts.fit(
                    one,
                    max_new_tokens=max_new_tokens,
                    asked=max_tokens is not None,
                    truncate=body.truncate_prompt_tokens,
                )
                for one in encoded
            ),
            params=params,
            n=n,
            make_grammar=make_grammar,
            user=user,
            stream=body.stream,
            stream_options=stream_options or StreamOptions(),
        )
