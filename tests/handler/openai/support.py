"""An OpenAI API without an engine: a test says what each reply is, one token per character."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from handler.adapters import Adapters
from handler.call import Call, Format
from handler.errors import RequestError
from handler.openai.api import OpenAiApi, Served
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.engine.stats import EngineStats
from llama2.text.tokenizer import Tokenizer
from llama2.weights.certificate import Certificate
from tests.handler.support import byte_tokenizer, config

LOGPROB = -0.5
USER = {"role": "user", "content": "Hi"}
SAID = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@dataclass(slots=True, kw_only=True)
class FakeStats:
    running: int = 0
    waiting: int = 0
    steps: int = 0
    last_step_at: float | None = None


@dataclass(frozen=True, slots=True)
class FakeGrammar:
    """Remembers what it was made of."""

    kind: str
    source: Any = None

    def matcher(self, *, continues_prompt: bool) -> Any:
        raise NotImplementedError


class FakeGrammars:
    def json_schema(self, schema: dict[str, Any]) -> FakeGrammar:
        if schema.get("type") == "nonsense":
            raise ValueError("there is no type 'nonsense'")
        return FakeGrammar("json_schema", schema)

    def json_object(self) -> FakeGrammar:
        return FakeGrammar("json_object")

    def regex(self, pattern: str) -> FakeGrammar:
        return FakeGrammar("regex", pattern)

    def choice(self, texts: list[str]) -> FakeGrammar:
        return FakeGrammar("choice", texts)

    def calls(self, schemas: Mapping[str, Mapping[str, Any]], *, several: bool) -> FakeGrammar:
        return FakeGrammar("calls", (schemas, several))


@dataclass(slots=True, kw_only=True)
class Server:
    """One API and its tokenizer."""

    tokenizer: Tokenizer
    api: OpenAiApi
    stats: FakeStats = field(default_factory=FakeStats)
    cached_tokens: int = 0  # of every prompt

    def read(self, path: str, **body: Any) -> Format:
        """The format of a call, prepared."""
        form = self.api.read(path, lambda: body)
        if form.prepare is not None:
            form.prepare()
        return form

    def requests(self, path: str, **body: Any) -> list[Request]:
        asked = self.read(path, **body).requests("id")
        return [one for one in asked if isinstance(one, Request)]

    def request(self, path: str, **body: Any) -> Request:
        (request,) = self.requests(path, **body)
        return request

    def get(self, path: str, **body: Any) -> Any:
        """The reply to what needs no engine."""
        call = Call("id")
        assert not call.begin(self.read(path, **body))
        return json.loads(call.piece().text)

    def refused(self, path: str, **body: Any) -> tuple[int, str | None, str]:
        with pytest.raises(RequestError) as caught:
            self.read(path, **body)
        return caught.value.status, caught.value.param, str(caught.value)

    def say(self, path: str, *replies: str, finish_reason: Any = "stop", **body: Any) -> Any:
        """The JSON of a whole reply, where the engine makes `replies`, in the order in which they are counted."""
        call = Call("id")
        for output in self.outputs(call.begin(self.read(path, **body)), replies, finish_reason):
            call.take(output)
        assert call.ended
        return json.loads(call.piece().text)

    def stream(self, path: str, *replies: str, finish_reason: Any = "stop", **body: Any) -> list[Any]:
        """The events of a stream; its end is checked here."""
        call = Call("id")
        requests, first = call.begin(self.read(path, stream=True, **body)), call.piece()
        assert first.content_type.startswith("text/event-stream")
        sent = first.text
        for output in self.outputs(requests, replies, finish_reason):
            call.take(output)
            sent += call.piece().text
        *events, done, nothing = sent.split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def outputs(self, requests: Sequence[Any], replies: Sequence[str], finish_reason: Any) -> Iterator[Output]:
        """Token by token, all replies in turn, as the engine makes them."""
        keys = [(request, index) for request in requests for index in range(request.n)]
        assert len(keys) == len(replies)
        for step in range(max(map(len, replies)) + 1):
            for (request, index), reply in zip(keys, replies, strict=True):
                if step <= len(reply):
                    yield self._output(request, index, reply, step, finish_reason)

    def _output(self, request: Request, index: int, reply: str, step: int, finish_reason: Any) -> Output:
        prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
        if request.prompt_logprobs is not None and index == step == 0:
            prompt_logprobs = (None, *(self.logprob(token_id, request) for token_id in request.prompt_ids[1:]))
        is_end = step == len(reply)
        token_ids = () if is_end else tuple(self.tokenizer.encode(reply[step]))
        return Output(
            request_id=request.request_id,
            index=index,
            text="" if is_end else reply[step],
            token_ids=token_ids,
            logprobs=tuple(self.logprob(token_id, request) for token_id in token_ids)
            if request.params.logprobs is not None
            else (),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=self.cached_tokens if index == step == 0 else 0,
            finish_reason=finish_reason if is_end else None,
        )

    def logprob(self, token_id: int, request: Request) -> TokenLogprobs:
        """A capital is less likely than the token "a", always likeliest but for a small letter itself."""
        (a,) = self.tokenizer.encode("a")
        capital = self.tokenizer.token_bytes(token_id).isupper()
        number = request.prompt_logprobs if request.prompt_logprobs is not None else request.params.logprobs
        top = ((a, -0.25) if capital else (token_id, LOGPROB),)[: number or 0]
        return TokenLogprobs(token_id=token_id, logprob=-2.0 if capital else LOGPROB, top=top)

    def shown(self, ids: Sequence[int]) -> str:
        """The text of prompt ids, special tokens spelled out."""
        spelling = {token_id: piece for piece, token_id in self.tokenizer.special_tokens.items()}
        return "".join(spelling.get(token_id) or self.tokenizer.token_bytes(token_id).decode() for token_id in ids)


def deltas(events: list[Any], index: int = 0) -> list[dict[str, Any]]:
    """What a stream says of one choice."""
    return [choice["delta"] for event in events for choice in event["choices"] if choice["index"] == index]


def usage(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0) -> dict[str, Any]:
    """As a reply has it."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def make_server(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    add_bos: bool = False,
    certificate: Certificate | None = None,
    adapters: Adapters | None = None,
    **handler: Any,
) -> Server:
    tokenizer = tokenizer or byte_tokenizer(folder, add_bos=add_bos)
    stats = FakeStats()
    api = OpenAiApi(
        tokenizer,
        config(folder, **{"max_seq_len": 100, "max_batch_size": 4, **handler}),
        vocab_size=tokenizer.vocab_size,
        served=Served(names=("smol", "llama"), system_fingerprint="fp_1"),
        grammars=FakeGrammars(),
        stats=lambda: cast(EngineStats, stats),
        certificate=certificate,
        adapters=adapters,
    )
    return Server(tokenizer=tokenizer, api=api, stats=stats)
