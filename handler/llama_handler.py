"""Owns the life of one rank inside a TorchServe worker: load, start the engine's thread, pass polls on, die loudly.

TorchServe loads the one class of this module and calls `handle` on every rank with the same requests; only what rank 0
returns is read. `handle` runs no model step: the engine's threads do, and rank 0's tells the others what to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handler.metrics import EngineMetrics
    from handler.transport import Transport
    from llama2.engine.engine import Engine

logger = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
# TorchServe's worker logs these at every poll, a hundred times a second.
_POLL_NOISE = ("Backend received inference at", "skip sending response at rank", "[METRICS]PredictionTime")


class LlamaHandler:
    """One rank of one worker."""

    _engine: Engine
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
        import torch

        from handler.config import HandlerConfig
        from handler.metrics import EngineMetrics
        from handler.native import NativeApi
        from handler.transport import Transport
        from llama2.chat import encode_dialog
        from llama2.engine.engine import Engine

        folder = Path(context.system_properties["model_dir"])
        config = HandlerConfig.from_settings(context.model_yaml_config, base=folder, environ=os.environ)
        self._engine = Engine.from_checkpoint(
            config.converted_ckpt_dir,
            tokenizer_path=config.tokenizer_path,
            model_args_path=config.model_args_path,
            dtype=getattr(torch, config.dtype) if config.dtype else None,
            device=config.device,
            config=config.engine,
        )
        self._engine.start(_end_process)
        if self._engine.rank == 0:
            with contextlib.suppress(ValueError):  # a model without a chat format
                # The first one imports and compiles, which no client should wait for.
                encode_dialog(self._engine.tokenizer, [{"role": "user", "content": "Hello!"}])
            self._transport = Transport(self._engine, NativeApi(self._engine.tokenizer, config).read)
            metrics = EngineMetrics(context.metrics, context.model_name)
            threading.Thread(target=self._keep_house, args=(metrics,), name="housekeeping", daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        if self._engine.rank != 0:
            return [""] * len(data)
        return self._transport.poll(data, context)

    def _keep_house(self, metrics: EngineMetrics) -> None:
        ticks = threading.Event()
        while not ticks.wait(HOUSEKEEPING_SECONDS):
            self._transport.abort_if_silent()
            metrics.publish(self._engine.stats())


def _end_process(error: BaseException) -> None:
    """The engine has failed on this rank. The group cannot go on without it, and TorchServe starts a new one when any
    process of it ends; an exception would leave the other ranks waiting for ever."""
    logger.critical("the engine has failed and takes its process group down: %r", error)
    logging.shutdown()
    os._exit(1)
