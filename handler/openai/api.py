"""Owns the OpenAI-compatible API: which paths there are, and what is answered without reading a body.

    GET   models, models/{id}, health, certificate
    POST  completions, chat/completions, responses, tokenize, detokenize, load_lora_adapter, unload_lora_adapter

all behind `v1/`, or without it. Whatever is wrong with a body is found out before its status line is sent. Knows no
torch, no TorchServe, and of the engine its statistics alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from handler.adapters import Adapters
from handler.call import Format
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.openai import adapter_updates, chat, completions, responses, tokenization
from handler.openai.constraints import Grammars
from handler.openai.generation import Model, Served
from handler.openai.replies import Immediate
from llama2.errors import InvalidValue
from llama2.text.tokenizer import Tokenizer
from llama2.weights.certificate import Certificate

if TYPE_CHECKING:
    from llama2.engine.stats import EngineStats

STALL_SECONDS = 60.0
_READERS: dict[str, Callable[[Model, Any], Format]] = {
    "completions": completions.read,
    "chat/completions": chat.read,
    "responses": responses.read,
    "tokenize": tokenization.tokenize,
    "detokenize": tokenization.detokenize,
    "load_lora_adapter": adapter_updates.load,
    "unload_lora_adapter": adapter_updates.unload,
}


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
        stats: Callable[[], EngineStats],
        certificate: Certificate | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        """`vocab_size` is the model's, which may have more ids than the tokenizer."""
        self._model = Model(
            served=served,
            config=config,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            grammars=grammars,
            adapters=adapters or Adapters(),
            created=int(time.time()),
        )
        self._stats = stats
        self._certificate = certificate
        self._seen = (-1, time.monotonic())  # the engine's steps, and when they were first so many

    def read(self, path: str, body: Callable[[], Any]) -> Format:
        """What is to be done at `path`.

        Raises:
            RequestError: nothing is there (404), or the body is wrong.
        """
        name = path.strip("/").removeprefix("v1/")
        if name in _READERS:
            try:
                return _READERS[name](self._model, body())
            except InvalidValue as error:
                raise RequestError.of(error, code="invalid_value") from None
        if name == "health":
            return self._health()
        if name == "certificate":
            return self._show_certificate()
        if name == "models":
            names = (*self._model.served.names, *self._model.adapters.names)
            return Immediate(reply={"object": "list", "data": [self._model.describe(one) for one in names]})
        if name.startswith("models/"):
            return Immediate(reply=self._model.describe(self._model.name(name.removeprefix("models/"))))
        raise RequestError(f"there is nothing at {path!r}", status=404, code="unknown_url")

    def _health(self) -> Format:
        """The engine makes steps, or has nothing to do. That there is a reply at all shows that the process lives."""
        stats, now = self._stats(), time.monotonic()
        busy = stats.running + stats.waiting > 0
        if not busy or stats.steps != self._seen[0]:
            self._seen = (stats.steps, now)
        if (seconds := now - self._seen[1]) > STALL_SECONDS:
            raise RequestError(f"the engine has work and has made no step for {seconds:.0f} s", status=503)
        return Immediate(
            reply={
                "status": "ok",
                "running": stats.running,
                "waiting": stats.waiting,
                "steps": stats.steps,
                "last_step_age": None if stats.last_step_at is None else round(now - stats.last_step_at, 3),
            }
        )

    def _show_certificate(self) -> Format:
        if self._certificate is None:
            raise RequestError(
                "this model has no certificate: python -m benchmarks.certify makes one, before the archive is built",
                status=404,
                code="no_certificate",
            )
        return Immediate(reply=self._certificate.to_json())
