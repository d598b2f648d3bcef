"""Owns the life of one rank inside a TorchServe worker: load, start the engine's thread, pass polls on, die loudly.

TorchServe loads the one class of this module and calls `handle` on every rank with the same requests; only what rank 0
returns is read. `handle` runs no model step: the engine's threads do, and rank 0's tells the others what to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handler.torchserve.metrics import EngineMetrics
    from handler.torchserve.transport import Transport
    from llama2.engine.service_loop import ServiceLoop

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.01
LOOKS_PER_PUBLISHING = 50
_PR_SET_PDEATHSIG = 1
# TorchServe's worker logs these at every poll, a hundred times a second.
_POLL_NOISE = ("Backend received inference at", "skip sending response at rank", "[METRICS]PredictionTime")


class LlamaHandler:
    """One rank of one worker."""

    _loop: ServiceLoop
    _transport: Transport

    def initialize(self, context: Any) -> None:
        """Load the model and start the engine.

        Raises:
            RuntimeError: the one kind of error that TorchServe reports as a failure to load.
        """
        # A rank that hangs in a collective would outlive its killed parent and keep its memory.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for sink in logging.getLogger().handlers:
            sink.addFilter(lambda record: not str(record.msg).startswith(_POLL_NOISE))
        try:
            self._load(context)
        except Exception as error:
            raise RuntimeError(f"the model cannot be served: {error}") from error

    def _load(self, context: Any) -> None:
        # Not at the top: TorchServe hides an ImportError there behind a look-up of its own handlers.
        from handler.torchserve import gpu_mask

        # CUDA reads its mask once, at the first question.
        gpu_mask.restore(os.environ)

        import torch

        from handler.config import HandlerConfig
        from handler.native import NativeApi
        from handler.openai.api import OpenAiApi, Served
        from handler.torchserve.metrics import EngineMetrics
        from handler.torchserve.transport import Transport
        from handler.torchserve.wire import read_in_large_pieces
        from llama2.engine.loading import load_engine
        from llama2.engine.service_loop import ServiceLoop
        from llama2.text.chat import encode_dialog
        from llama2.text.grammar import GrammarCompiler

        read_in_large_pieces()
        folder = Path(context.system_properties["model_dir"])
        config = HandlerConfig.from_settings(context.model_yaml_config, base=folder, environ=os.environ)
        engine = load_engine(
            config.converted_ckpt_dir,
            tokenizer_path=config.tokenizer_path,
            model_args_path=config.model_args_path,
            dtype=getattr(torch, config.dtype) if config.dtype else None,
            device=config.device,
            config=config.engine,
        )
        self._loop = ServiceLoop(engine, _end_process)
        if engine.rank == 0:
            tokenizer = engine.tokenizer
            grammars = GrammarCompiler(tokenizer, engine.args.vocab_size)
            # The first of these import and compile, which no client should wait for.
            with contextlib.suppress(ValueError):  # a model without a chat format
                encode_dialog(tokenizer, [{"role": "user", "content": "Hello!"}])
            with contextlib.suppress(ValueError):  # a vocabulary without an end of text
                grammars.json_object()
            native = NativeApi(tokenizer, config)
            openai = OpenAiApi(
                tokenizer,
                config,
                vocab_size=engine.args.vocab_size,
                served=Served(
                    names=tuple(dict.fromkeys((context.model_name, "llama"))),
                    system_fingerprint=config.fingerprint(),
                ),
                grammars=grammars,
                stats=self._loop.stats,
            )
            # The model's own path is the native API, and all behind it is OpenAI's.
            self._transport = Transport(
                self._loop, lambda path, body: openai.read(path, body) if path else native.read(body())
            )
            metrics = EngineMetrics(context.metrics, context.model_name)
            threading.Thread(target=self._keep_house, args=(metrics,), name="housekeeping", daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        if self._loop.engine.rank != 0:
            return [""] * len(data)
        return self._transport.poll(data, context)

    def _keep_house(self, metrics: EngineMetrics) -> None:
        ticks = threading.Event()
        running = 0
        for look in itertools.count():
            ticks.wait(LOOK_SECONDS)
            self._transport.watch()
            stats = self._loop.stats()
            # Other numbers change at every step; this one everybody shall know at once.
            if stats.running != running or look % LOOKS_PER_PUBLISHING == 0:
                metrics.publish(stats)
                running = stats.running


def _end_process(error: BaseException) -> None:
    """The engine has failed on this rank. The group cannot go on without it, and TorchServe starts a new one when any
    process of it ends; an exception would leave the other ranks waiting for ever."""
    logger.critical("the engine has failed and takes its process group down: %r", error)
    logging.shutdown()
    os._exit(1)
