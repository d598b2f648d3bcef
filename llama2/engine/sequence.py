"""Owns what a request is, from its prompt to its last token.

Knows no torch, no tensors and no text: ids in, ids out.
"""

from __future__ import annotations

import enum
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from llama2.engine.prompt_scores import PromptScores
    from llama2.text.text_stream import TextStream

from llama2.adapters.reference import AdapterRef
from llama2.engine.sampling_params import MAX_LOGPROBS, SamplingParams, integer

FinishReason = Literal["stop", "length", "abort", "error"]


class Matcher(Protocol):
    """One reply's state in a grammar. `failed`: it could not be followed to its end, so the reply is invalid."""

    @property
    def failed(self) -> bool: ...

    def mask_W(self) -> Any:
        """What can follow now, always at least one token: int32 words (a tensor on the CPU), a bit for each of 32 ids,
        the lowest id's first. Valid until the next call."""

    def accept(self, token_id: int) -> None:
        """The token was chosen."""


class Grammar(Protocol):
    """What a reply must look like. `source` says it in llguidance's words, for another process."""

    @property
    def source(self) -> str: ...

    def matcher(self, *, continues_prompt: bool) -> Matcher:
        """For one reply; `continues_prompt` as in `Request`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the front end gives the engine: prompt ids (BOS included where the format has one) and how to continue.

    `continues_prompt` keeps the white space between prompt and reply, as the tokenizer would write both in one piece:
    True for a completion, which continues its prompt, False for a chat reply, which is a separate text.

    The `params.n` replies share the KV blocks of the prompt. `prompt_logprobs=k` asks for the log-probabilities of the
    prompt's own tokens, with the k most likely at each; `score` for the raw logits of every prompt position.
    `generate=False` ends after the prompt. Without an `adapter` it is the base model's.

    Raises:
        InvalidValue: `prompt_logprobs` is out of range.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    continues_prompt: bool = True
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None
    score: bool = False
    generate: bool = True
    adapter: AdapterRef | None = None

    def __post_init__(self) -> None:
        if self.prompt_logprobs is not None:
            integer("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS)

    @property
    def n(self) -> int:
        return self.params.n

    @property
    def wants_prompt_logits(self) -> bool:
        return self.score or self.prompt_logprobs is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """Load an adapter before a request needs it, or unload it once no request does. One Output says how it went."""

    request_id: str
    kind: Literal["load", "unload"]
    adapter: AdapterRef

    @property
    def n(self) -> int:
        """It has one end, as a request has one of each reply."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities (natural logarithm) at one position; `top` is most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What reply `index` of a request gained since its last Output. `finish_reason` is set on its last one, once;
    "error" means that the reply could not be held to its grammar, or that its adapter has the `problem`.

    `prompt_logprobs`, if asked for, come all at once with the first Output of reply 0: one for each position of the
    prompt, None for the first, which nothing precedes. So does `cached_tokens`: how many of its tokens were in the
    prefix cache. `prompt_logits` is a tensor (prompt, V), fp32 on the CPU, if `score` asked for it.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    cached_tokens: int = 0
    prompt_logits: Any = None
    problem: str = ""
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One reply, whole. `token_ids` holds every generated id, including a final EOS or stop id; `logprobs` is None if
    they were not asked for."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of one prompt: `outputs` holds its n replies. `text` and the like are those of the first."""

    prompt_tokens: int
    outputs: tuple[Reply, ...]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """One reply inside the engine. The n replies of a request are one sequence until its prompt is computed.

    Invariant: the KV cache holds positions [0, num_computed) of `token_ids`, in the blocks of `block_table`.
    A preempted sequence keeps its tokens, gives its blocks back and restarts at num_computed = 0.
    `num_unread` more tokens follow `token_ids`: they were sampled, but the host has not read them yet. They are in the
    device's token pool, from `pool_place` on, which belongs to this sequence while it runs; one token fits there.
    `num_forks` more sequences will fork from this one, with the arrivals that follow its own. `block_digests` are the
    block manager's names for the full blocks of `token_ids`, as far as it has needed them. `num_cached` of its tokens
    were in the cache when it first started; None before. `adapter` is the identity of its adapter, empty without one,
    which is in `slot` while it runs. `text` and `prompt_scores` are the engine's.
    """

    request: Request
    arrival: int
    token_ids: list[int]
    index: int = 0
    num_forks: int = 0
    matcher: Matcher | None = None
    text: TextStream | None = None
    prompt_scores: PromptScores | None = None
    num_unread: int = 0
    pool_place: int = -1
    num_computed: int = 0
    num_cached: int | None = None
    block_table: array[int] = field(default_factory=lambda: array("i"))
    block_digests: list[bytes] = field(default_factory=list)
    adapter: bytes = b""
    slot: int = -1
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None

    @classmethod
    def of(cls, request: Request, arrival: int, adapter: bytes = b"") -> Sequence:
        return cls(
            request=request,
            arrival=arrival,
            token_ids=list(request.prompt_ids),
            num_forks=request.n - 1,
            adapter=adapter,
            matcher=request.grammar.matcher(continues_prompt=request.continues_prompt) if request.grammar else None,
        )

    def fork(self) -> list[Sequence]:
        """The other replies of the request, once this one has computed its prompt. They copy its block table; counting
        the holders is up to the block manager."""
        assert self.num_generated == 0
        forks = [
            Sequence.of(self.request, self.arrival + index, self.adapter) for index in range(1, self.num_forks + 1)
        ]
        for index, fork in enumerate(forks, start=1):
            fork.index, fork.num_forks = index, 0
            fork.block_table = self.block_table[:]
            fork.block_digests = list(self.block_digests)
            fork.num_computed = self.num_prompt
            fork.status = self.status
        self.num_forks = 0
        return forks

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Including unread ones."""
        return len(self.token_ids) + self.num_unread

    def is_complete(self, max_seq_len: int) -> bool:
        """Does it have as many tokens as it may?"""
        return self.num_generated == self.request.params.max_new_tokens or self.num_tokens == max_seq_len

    @property
    def num_uncomputed(self) -> int:
        """Tokens whose keys and values are not in the cache yet: 1 while decoding, more while prefilling."""
        return self.num_tokens - self.num_computed
