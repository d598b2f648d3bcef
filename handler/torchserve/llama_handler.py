"""Owns the life of one rank inside a TorchServe worker: load the service, pass polls on, die loudly.

TorchServe loads the one class of this module and calls `handle` on every rank with the same requests; only what rank 0
returns is read. `handle` runs no model step: the engine's threads do, and rank 0's tells the others what to run.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handler.service import Service
    from handler.torchserve.metrics import EngineMetrics
    from handler.torchserve.transport import Transport

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.01
LOOKS_PER_PUBLISHING = 50
_PR_SET_PDEATHSIG = 1
# TorchServe's worker logs these at every poll, a hundred times a second.
_POLL_NOISE = ("Backend received inference at", "skip sending response at rank", "[METRICS]PredictionTime")


class LlamaHandler:
    """One rank of one worker."""

    _service: Service
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
        from handler.torchserve import gpu_mask, wire

        # CUDA reads its mask once, at the first question.
        gpu_mask.restore(os.environ)

        from handler.service import Service
        from handler.torchserve.metrics import EngineMetrics
        from handler.torchserve.model_config import read_model_config
        from handler.torchserve.transport import Transport

        wire.install()
        folder = Path(context.system_properties["model_dir"])
        config = read_model_config(context.model_yaml_config, base=folder, environ=os.environ)
        self._service = Service.load(config, names=(context.model_name, "llama"), on_failure=_end_process)
        if self._service.loop.engine.rank == 0:
            self._transport = Transport(self._service)
            metrics = EngineMetrics(context.metrics, context.model_name)
            threading.Thread(target=self._keep_house, args=(metrics,), name="housekeeping", daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | None]:
        if self._service.loop.engine.rank != 0:
            return [""] * len(data)
        from handler.torchserve.wire import NoReply

        replies = self._transport.poll(data, context)
        return NoReply([""] * len(data)) if replies is None else replies

    def _keep_house(self, metrics: EngineMetrics) -> None:
        ticks = threading.Event()
        running = 0
        for look in itertools.count():
            ticks.wait(LOOK_SECONDS)
            self._transport.watch()
            stats = self._service.loop.stats()
            # Other numbers change at every step; a change of this one is published at once.
            if stats.running != running or look % LOOKS_PER_PUBLISHING == 0:
                metrics.publish(stats)
                running = stats.running


def _end_process(error: BaseException) -> None:
    """The engine has failed on this rank. The group cannot go on without it, and TorchServe starts a new one when any
    process of it ends; an exception would leave the other ranks waiting for ever."""
    logger.critical("the engine has failed and takes its process group down: %r", error)
    logging.shutdown()
    os._exit(1)
