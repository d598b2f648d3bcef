"""Owns the OpenAI-compatible API: which paths there are, and the way from a body to what the engine is asked.

    GET   models, models/{id}, health
    POST  completions, chat/completions, tokenize, detokenize

all behind `v1/`, or without it. Whatever is wrong with a body is found out here, before its status line is sent. Knows
no torch, no TorchServe, and of the engine its statistics alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from handler.call import Format
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.openai.chat import ChatFormat
from handler.openai.completions import CompletionFormat
from handler.openai.inspector import Inspector
from handler.openai.logprobs import TokenNames
from handler.openai.prompts import Encoded, PromptReader, plain
from handler.openai.responses import Generation, Immediate
from handler.openai.sampling import Grammars, grammar_maker, sampling_params
from handler.openai.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    Tool,
    parse,
)
from handler.prompt import Prompt
from llama2.text.tokenizer import Tokenizer

MAX_REPLIES = 1024  # of one call
DEFAULT_COMPLETION_TOKENS = 16
STALL_SECONDS = 60.0


class Stats(Protocol):
    """What is asked of the engine's statistics."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def steps(self) -> int: ...

    @property
    def seconds_since_step(self) -> float | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What this server serves: the names it answers to, the first of which it calls itself; and a short hash of weights
    and settings."""

    names: tuple[str, ...]
    system_fingerprint: str


class OpenAiApi:
    """Reads bodies for one model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: HandlerConfig,
        *,
        vocab_size: int,
        served: Served,
        grammars: Grammars,
        stats: Callable[[], Stats],
    ) -> None:
        """`vocab_size` is the model's, which may have more ids than the tokenizer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._config = config
        self._served = served
        self._grammars = grammars
        self._stats = stats
        self._prompts = PromptReader(tokenizer, config)
        self._inspector = Inspector(tokenizer)
        self._names = TokenNames(tokenizer)
        self._created = int(time.time())
        self._seen = (-1, time.monotonic())  # the engine's steps, and when they were first so many

    def read(self, path: str, body: Callable[[], Any]) -> Format:
        """What is to be done at `path`.

        Raises:
            RequestError: nothing is there (404), or the body is wrong.
        """
        name = path.strip("/").removeprefix("v1/")
        writers: dict[str, Callable[[Any], Format]] = {
            "completions": self._completions,
            "chat/completions": self._chat,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
        }
        if name in writers:
            return writers[name](body())
        if name == "health":
            return self._health()
        if name == "models":
            return Immediate(reply={"object": "list", "data": [self._describe(one) for one in self._served.names]})
        if name.startswith("models/"):
            return Immediate(reply=self._describe(self._model(name.removeprefix("models/"))))
        raise RequestError(f"there is nothing at {path!r}", status=404, code="unknown_url")

    # ---- generation ----

    def _completions(self, raw: Any) -> Format:
        body = parse(CompletionBody, raw)
        if body.best_of is not None and body.best_of < (body.n or 1):
            raise _invalid("best_of", f"must be at least n={body.n or 1}, got {body.best_of}")
        if body.stream and (body.best_of or 0) > (body.n or 1):
            raise _invalid("best_of", "greater than n cannot be streamed: the best are known at the end")
        best_of = body.best_of or body.n or 1
        if body.max_tokens == 0 and best_of > 1:
            raise _invalid("best_of" if body.best_of else "n", f"must be 1 with max_tokens=0, got {best_of}")
        encoded = self._prompts.completion(body.prompt)
        max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        generation = self._generation(
            body,
            encoded,
            n=best_of,
            max_tokens=max_tokens,
            asked=body.max_tokens is not None,
            logprobs=body.logprobs if best_of == (body.n or 1) else body.logprobs or 0,
            user=body.user,
        )
        if body.dry_run:
            pairs = zip(generation.prompts, encoded, strict=True)
            return self._inspected(generation, [self._inspector.text(prompt, one.ids) for prompt, one in pairs])
        return CompletionFormat(generation, body, self._tokenizer)

    def _chat(self, raw: Any) -> Format:
        body = parse(ChatBody, raw)
        if body.top_logprobs is not None and not body.logprobs:
            raise _invalid("top_logprobs", "needs logprobs to be true")
        if body.max_tokens == 0:
            raise _invalid("max_tokens", "must be at least 1, got 0")
        limits = {limit for limit in (body.max_tokens, body.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise _invalid("max_tokens", f"contradicts max_completion_tokens={body.max_completion_tokens}")
        messages = plain(body.messages)
        tools = self._prompts.chat(
            messages, body.tools, body.tool_choice, special_tags="encode" if body.dry_run else None
        )
        for index, tool in enumerate(body.tools or ()):
            if tool.function.strict and tools.schema is None:
                raise _invalid(f"tools[{index}].function.strict", "needs a tool_choice that forces a call")
        encoded = Encoded(ids=tools.ids, place="messages")
        generation = self._generation(
            body,
            [encoded],
            n=body.n or 1,
            max_tokens=max(limits, default=None),
            asked=bool(limits),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            user=body.safety_identifier or body.user,
            call_schema=tools.schema,
        )
        if body.dry_run:
            report = self._inspect_dialog(generation.prompts[0], encoded, messages, body.tools)
            return self._inspected(generation, [report])
        return ChatFormat(generation, body, tools, self._tokenizer)

    def _generation(
        self,
        body: GenerationBody,
        encoded: Sequence[Encoded],
        *,
        n: int,
        max_tokens: int | None,
        asked: bool,
        logprobs: int | None,
        user: str | None,
        call_schema: dict[str, Any] | None = None,
    ) -> Generation:
        """What both endpoints check and ask in the same way. A `max_tokens` that was `asked` for must fit in; 0 of them
        is one, which is then not generated."""
        model = self._model(body.model)
        if body.stream_options is not None and not body.stream:
            raise _invalid("stream_options", "needs stream to be true")
        if n > self._config.engine.max_batch_size:
            raise _invalid("n", f"must be at most {self._config.engine.max_batch_size} on this server, got {n}")
        if n * len(encoded) > MAX_REPLIES:
            raise _invalid("prompt", f"asks for {n * len(encoded)} replies, but one call may have {MAX_REPLIES}")
        self._check_ids(body, encoded)
        max_new_tokens = 1 if max_tokens == 0 else max_tokens
        return Generation(
            body=body,
            model=model,
            system_fingerprint=self._served.system_fingerprint,
            prompts=tuple(
                self._prompts.fit(one, max_new_tokens=max_new_tokens, asked=asked, truncate=body.truncate_prompt_tokens)
                for one in encoded
            ),
            params=sampling_params(body, max_new_tokens=max_new_tokens, logprobs=logprobs),
            n=n,
            make_grammar=grammar_maker(body, self._grammars, call_schema=call_schema),
            user=user,
        )

    def _check_ids(self, body: GenerationBody, encoded: Sequence[Encoded]) -> None:
        biased = [int(key) for key in body.logit_bias or () if key.isascii() and key.isdecimal()]
        named = {one.place: one.ids for one in encoded}
        for param, ids in {**named, "stop_token_ids": body.stop_token_ids or [], "logit_bias": biased}.items():
            wrong = [token_id for token_id in ids if token_id >= self._vocab_size]
            if wrong:
                raise _invalid(param, f"must hold token ids below {self._vocab_size}, got {wrong[0]}")

    # ---- what needs no engine ----

    def _inspected(self, generation: Generation, prompts: list[dict[str, Any]]) -> Immediate:
        return Immediate(reply={"object": "prompt.inspection", "model": generation.model, "prompts": prompts})

    def _inspect_dialog(
        self, prompt: Prompt, encoded: Encoded, messages: list[dict[str, Any]], tools: Sequence[Tool] | None
    ) -> dict[str, Any]:
        report = self._inspector.dialog(
            prompt,
            encoded.ids,
            messages,
            lambda others: self._prompts.chat(others, tools, special_tags="encode").ids,
        )
        try:
            self._prompts.chat(messages, tools, special_tags="reject")
        except RequestError as error:
            report["lint"].append({"rule": "tag_in_message", "message": str(error)})
        return report

    def _tokenize(self, raw: Any) -> Format:
        body = parse(TokenizeBody, raw)
        self._model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise _invalid("prompt", "or messages must be there, and not both")
        reply: dict[str, Any] = {"max_model_len": self._config.engine.max_seq_len}
        if body.messages is not None:
            if body.add_special_tokens:
                raise _invalid("add_special_tokens", "must be false with messages: the chat format has its own")
            messages = plain(body.messages)
            ids = self._prompts.chat(messages, body.tools, special_tags="encode").ids
            reply["inspection"] = self._inspect_dialog(
                Prompt(ids=tuple(ids)), Encoded(ids=ids, place="messages"), messages, body.tools
            )
        else:
            assert body.prompt is not None
            with_bos = body.add_special_tokens is not False
            ids = self._prompts.text(body.prompt, "prompt", with_bos=with_bos).ids
        names = [self._names.name(token_id) for token_id in ids] if body.return_token_strs else None
        return Immediate(reply={"count": len(ids), "tokens": ids, "token_strs": names, **reply})

    def _detokenize(self, raw: Any) -> Format:
        body = parse(DetokenizeBody, raw)
        self._model(body.model)
        for index, token_id in enumerate(body.tokens):
            if token_id >= self._tokenizer.vocab_size:
                raise _invalid(f"tokens[{index}]", f"must be less than {self._tokenizer.vocab_size}, got {token_id}")
        return Immediate(reply={"prompt": self._names.spell(body.tokens)})

    def _health(self) -> Format:
        """The engine makes steps, or has nothing to do. That its process lives is said by there being a reply."""
        stats, now = self._stats(), time.monotonic()
        busy = stats.running + stats.waiting > 0
        if not busy or stats.steps != self._seen[0]:
            self._seen = (stats.steps, now)
        if (seconds := now - self._seen[1]) > STALL_SECONDS:
            raise RequestError(f"the engine has work and has made no step for {seconds:.0f} s", status=503)
        age = stats.seconds_since_step
        return Immediate(
            reply={
                "status": "ok",
                "running": stats.running,
                "waiting": stats.waiting,
                "steps": stats.steps,
                "last_step_age": None if age is None else round(age, 3),
            }
        )

    def _model(self, name: str | None) -> str:
        """The served model's name, as the client says it."""
        if name is None:
            return self._served.names[0]
        if name not in self._served.names:
            known = " or ".join(map(repr, self._served.names))
            raise RequestError(
                f"the model {name!r} does not exist; this server has {known}",
                param="model",
                status=404,
                code="model_not_found",
            )
        return name

    def _describe(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "torchserve",
            "max_model_len": self._config.engine.max_seq_len,
        }


def _invalid(param: str, problem: str) -> RequestError:
    return RequestError(f"{param} {problem}", param=param, code="invalid_value")
