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
from typing import Any

import torch

from handler.body import read_body
from handler.call import Call, Format
from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.native import NativeApi
from handler.openai.api import OpenAiApi, Served
from llama2.engine.loading import load_engine
from llama2.engine.service_loop import ServiceLoop
from llama2.errors import InvalidValue
from llama2.text.chat import encode_dialog
from llama2.text.grammar import GrammarCompiler

logger = logging.getLogger(__name__)

# One call may ask for many replies, so a front's own limit on calls does not bound what waits in the engine.
MAX_REPLIES = 4096

# So that a body which takes long, with a long text or a large grammar, holds up few others.
READERS = 4

# From all that is behind the model's own path, and the way to the body, which not every path needs.
Read = Callable[[str, Callable[[], dict[str, Any] | str]], Format]


class Service:
    """One model that is served. All of it may be used from any thread of rank 0; other ranks only load and close."""

    def __init__(self, loop: ServiceLoop, read: Read) -> None:
        """`read` turns a path and a body into a call's format, or raises RequestError."""
        self.loop = loop
        self._read = read
        self._running: dict[str, Call] = {}
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")

    @classmethod
    def load(
        cls, config: HandlerConfig, *, names: Sequence[str], on_failure: Callable[[BaseException], None]
    ) -> Service:
        """Load the model and start its engine. Called on every rank.

        `names` are those that the model answers to, the first of which it calls itself. `on_failure` is called on a
        rank whose engine has failed: the group cannot go on without it.

        Raises:
            ValueError: the checkpoint, the tokenizer, the degree or a size is wrong.
            LockstepError: the ranks were given different settings.
        """
        engine = load_engine(
            config.converted_ckpt_dir,
            tokenizer_path=config.tokenizer_path,
            model_args_path=config.model_args_path,
            dtype=getattr(torch, config.dtype) if config.dtype else None,
            device=config.device,
            config=config.engine,
        )
        loop = ServiceLoop(engine, on_failure)
        return cls(loop, _apis(loop, config, names) if engine.rank == 0 else _no_api)

    def close(self) -> None:
        """End the engine on every rank. All ranks call it."""
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
                    self.loop.add(request)
        except Exception as error:
            self.abort(call, _as_request_error(error))


def _apis(loop: ServiceLoop, config: HandlerConfig, names: Sequence[str]) -> Read:
    """The model's own path is the native API, and all behind it is OpenAI's."""
    tokenizer, vocab_size = loop.engine.tokenizer, loop.engine.args.vocab_size
    grammars = GrammarCompiler(tokenizer, vocab_size)
    # The first of these import and compile, which no client should wait for.
    with contextlib.suppress(ValueError):  # a model without a chat format
        encode_dialog(tokenizer, [{"role": "user", "content": "Hello!"}])
    with contextlib.suppress(ValueError):  # a vocabulary without an end of text
        grammars.json_object()
    native = NativeApi(tokenizer, config)
    openai = OpenAiApi(
        tokenizer,
        config,
        vocab_size=vocab_size,
        served=Served(names=tuple(dict.fromkeys(names)), system_fingerprint=config.fingerprint()),
        grammars=grammars,
        stats=loop.stats,
    )
    return lambda path, body: openai.read(path, body) if path else native.read(body())


def _no_api(path: str, body: Callable[[], Any]) -> Format:
    raise AssertionError("requests go to rank 0")


def _as_request_error(error: Exception) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InvalidValue):
        return RequestError.of(error)
    logger.error("a request has met a fault of the server", exc_info=error)
    return RequestError("the server failed on this request; its log says why", status=500)
