"""Owns the life of a TorchServe worker: load the service, pass polls on, and leave when the engine has failed.

TorchServe loads the one class of this module and calls `handle` with all live requests, again and again. It computes
nothing: the engine's ranks are processes of their own.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handler.service import Service
    from handler.torchserve.metrics import EngineMetrics
    from handler.torchserve.transport import Transport
    from llama2.errors import EngineFailure

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.01
LOOKS_PER_PUBLISHING = 50
# How long a thread that wants to run waits for one that does not stop by itself: a poll, for a body that is being read.
SWITCH_SECONDS = 0.0005
# How long a worker whose engine has failed waits for its last replies to be sent, and to be asked for them.
PARTING_SECONDS = 0.3
LONGEST_PARTING_SECONDS = 5.0
# TorchServe's worker logs these at every poll, a hundred times a second.
_POLL_NOISE = ("Backend received inference at", "[METRICS]PredictionTime")


class LlamaHandler:
    """One worker."""

    _service: Service
    _transport: Transport

    def initialize(self, context: Any) -> None:
        """Load the model and start the engine.

        Raises:
            RuntimeError: the one kind of error that TorchServe reports as a failure to load.
        """
        sys.setswitchinterval(SWITCH_SECONDS)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a text is encoded in the thread that reads it
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
        self._service = Service.load(
            config, names=(context.model_name, "llama"), certificate_dir=folder, on_failure=self._leave
        )
        self._transport = Transport(self._service)
        # A collection of all that was imported and loaded takes 0.1 s, in which no thread runs.
        gc.collect()
        gc.freeze()
        metrics = EngineMetrics(context.metrics, context.model_name)
        threading.Thread(target=self._keep_house, args=(metrics,), name="housekeeping", daemon=True).start()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | None]:
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

    def _leave(self, failure: EngineFailure) -> None:
        """End this process, so that TorchServe starts another; first everybody who waits for a reply gets its end."""
        logger.critical("the engine has failed, and this worker ends: %s", failure)
        end = time.monotonic() + LONGEST_PARTING_SECONDS
        while time.monotonic() < end and not self._transport.is_quiet(PARTING_SECONDS):
            time.sleep(LOOK_SECONDS)
        logging.shutdown()
        os._exit(1)
