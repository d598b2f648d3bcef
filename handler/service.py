"""Owns one model that is served: its engine, both APIs and the live calls.

Knows no front. A front opens a call for each body it gets, sends the call's pieces as they come, aborts it when its
client leaves, and has one thread that delivers what the engine has made.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from handler.adapters import Adapters
from handler.body import read_body
from handler.call import Call, Format
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.native import NativeApi
from handler.openai.api import OpenAiApi, Served
from llama2.config import ModelArgs
from llama2.engine.limits import Limits
from llama2.engine.messages import Settings
from llama2.engine.remote import RemoteEngine
from llama2.engine.sequence import Errand, Output, Request
from llama2.engine.stats import EngineStats
from llama2.errors import EngineFailure, InvalidValue
from llama2.text.chat import encode_dialog
from llama2.text.grammar import GrammarCompiler
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from llama2.weights.certificate import Certificate, read_certificate

logger = logging.getLogger(__name__)

# One call may ask for many replies, so a front's own limit on calls does not bound what waits in the engine.
MAX_REPLIES = 4096

# Several, so that a body which takes long, with a long text or a large grammar, holds up few others.
READERS = 4

# Takes what follows the model's own path, and a function that reads the body, which not every path needs.
Read = Callable[[str, Callable[[], dict[str, Any] | str]], Format]


class EngineLoop(Protocol):
    """What a service needs of an engine, in this process (`ServiceLoop`) or in others (`RemoteEngine`)."""

    def add(self, request: Request) -> None: ...

    def run_errand(self, errand: Errand) -> None: ...

    def abort(self, request_id: str) -> None: ...

    def suspend(self) -> None: ...

    def resume(self) -> None: ...

    def poll(self, timeout: float) -> list[Output]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class Service:
    """One model that is served. All of it may be used from any thread."""

    def __init__(self, loop: EngineLoop, read: Read) -> None:
        """`read` turns a path and a body into a call's format, or raises RequestError."""
        self.loop = loop
        self._read = read
        self._running: dict[str, Call] = {}
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    @classmethod
    def load(
        cls,
        config: HandlerConfig,
        *,
        names: Sequence[str],
        certificate_dir: Path | None = None,
        on_failure: Callable[[EngineFailure], None] = lambda _: None,
    ) -> Service:
        """Start the engine's ranks, and wait until they have loaded the model.

        `names` are those that the model answers to, the first of which it calls itself. `certificate_dir` holds the
        weights' certificate if it is not their own folder. `on_failure` is called when
        the engine has failed, in a thread of its own, when every call has been told.

        Raises:
            ValueError: the tokenizer or the model's description is wrong, or a certificate is about other weights.
            EngineFailure: the checkpoint, the degree or a size is; or a rank has died.
        """
        adapters = Adapters(
            config.adapters_dir,
            can_change=config.allow_runtime_lora_updating,
            max_rank=config.engine.max_lora_rank,
        )
        config = config.with_engine(replace(config.engine, max_lora_rank=adapters.max_rank))
        settings = Settings(
            checkpoint_dir=config.converted_ckpt_dir,
            tokenizer_path=config.tokenizer_path,
            model_args_path=config.model_args_path,
            dtype=config.dtype,
            device=config.device,
            config=config.engine,
        )
        # Of what was set: the rest depends on the machine.
        served = Served(names=tuple(dict.fromkeys(names)), system_fingerprint=config.fingerprint())
        args = ModelArgs.load(config.model_args_path or config.converted_ckpt_dir)
        tokenizer = load_tokenizer(config.tokenizer_path or config.converted_ckpt_dir)
        certificate = read_certificate(certificate_dir or config.converted_ckpt_dir, weights=config.converted_ckpt_dir)
        engine = RemoteEngine(settings, degree=config.degree, threads=config.threads, step_timeout=config.step_timeout)
        try:
            grammars = _warm_up(tokenizer, args.vocab_size)
            ready = engine.wait_until_ready()
            config = config.with_engine(ready.config)
        except BaseException:
            engine.close()
            raise
        service = cls(
            engine, _apis(tokenizer, grammars, ready.limits, config, served, engine.stats, certificate, adapters)
        )

        def fail(failure: EngineFailure) -> None:
            service.fail(failure)
            on_failure(failure)

        engine.on_failure(fail)
        return service

    def close(self) -> None:
        """End the engine."""
        self._pool.shutdown(cancel_futures=True)
        self.loop.close()

    def open(
        self,
        call_id: str,
        path: str,
        body: Any,
        *,
        is_json: bool = False,
        on_news: Callable[[], None] = lambda: None,
    ) -> Call:
        """Accept a call, which other threads prepare. A fault in it is told by its pieces.

        `call_id` is unique among live calls. `path` is what the client has asked for behind the model's own path, and
        `body` what it has sent, as `read_body` takes it.
        """
        call = Call(call_id, on_news=on_news)
        self._pool.submit(self._start, call, lambda: self._read(path, lambda: read_body(body, is_json=is_json)))
        return call

    def deliver(self, timeout: float) -> bool:
        """Give what the engine has made to its calls, waiting up to `timeout` seconds for the first of it; returns
        whether there was any. One thread does this."""
        outputs = self.loop.poll(timeout)
        with self._lock:
            for output in outputs:
                call = self._running.get(output.request_id.rpartition("/")[0])
                if call is not None:
                    try:
                        call.take(output)
                    except Exception as error:
                        self.abort(call, _as_request_error(error))
                    if call.ended:
                        self._running.pop(call.call_id, None)
        return bool(outputs)

    def abort(self, call: Call, error: RequestError) -> None:
        """Give a call up; `error` is for a client that is still there."""
        with self._lock:
            call.fail(error)
            self._running.pop(call.call_id, None)
            for request in call.requests:
                self.loop.abort(request.request_id)

    def fail(self, failure: EngineFailure) -> None:
        """Give up every call that runs: the engine has failed."""
        with self._lock:
            for call in self._running.values():
                call.fail(_as_request_error(failure))
            self._running.clear()

    def _start(self, call: Call, read: Callable[[], Format]) -> None:
        if call.ended:
            return
        try:
            form = read()
            if form.prepare is not None:
                form.prepare()
            with self._lock:
                requests = call.begin(form)
                live = sum(other.num_replies for other in self._running.values())
                if live and live + call.num_replies > MAX_REPLIES:
                    raise RequestError(
                        f"the server has {live} replies to make and takes at most {MAX_REPLIES}: try again later",
                        status=429,
                        code="rate_limit_exceeded",
                    )
                if requests:
                    self._running[call.call_id] = call
                for request in requests:
                    self.loop.run_errand(request) if isinstance(request, Errand) else self.loop.add(request)
        except Exception as error:
            self.abort(call, _as_request_error(error))


def _warm_up(tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
    """Do what imports and compiles at its first time, which no client should wait for."""
    grammars = GrammarCompiler(tokenizer, vocab_size)
    with contextlib.suppress(ValueError):  # a model without a chat format
        encode_dialog(tokenizer, [{"role": "user", "content": "Hello!"}])
    with contextlib.suppress(ValueError):  # a vocabulary without an end of text
        grammars.json_object()
    return grammars


def _apis(
    tokenizer: Tokenizer,
    grammars: GrammarCompiler,
    limits: Limits,
    config: HandlerConfig,
    served: Served,
    stats: Callable[[], EngineStats],
    certificate: Certificate | None,
    adapters: Adapters,
) -> Read:
    """The model's own path is the native API, and all behind it is OpenAI's."""
    native = NativeApi(tokenizer, config, adapters)
    openai = OpenAiApi(
        tokenizer,
        config,
        vocab_size=limits.vocab_size,
        served=served,
        grammars=grammars,
        stats=stats,
        certificate=certificate,
        adapters=adapters,
    )
    return lambda path, body: openai.read(path, body) if path else native.read(body())


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InvalidValue):
        return RequestError.of(error)
    if isinstance(error, EngineFailure):
        return RequestError("the engine has failed and is started anew: try again in a moment", status=503)
    logger.error("a request has met a fault of the server", exc_info=error)
    return RequestError("the server failed on this request; its log says why", status=500)
