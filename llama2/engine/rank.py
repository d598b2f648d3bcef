"""Runs one rank of an engine for another process: `python -m llama2.engine.rank`, as `launch.Ranks` starts it.

Knows no front: commands come and news goes through a pipe, whose other end is `engine.remote`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import logging
import mmap
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from llama2.engine.loading import load_engine
from llama2.engine.messages import Abort, Add, Command, Failed, News, Ready, Settings
from llama2.engine.sequence import Errand
from llama2.engine.service_loop import ServiceLoop
from llama2.parallel import shared_layout
from llama2.parallel.process_group import Launched, choose_device
from llama2.text.grammar import GrammarCompiler

logger = logging.getLogger(__name__)

# How long statistics may lag behind a step that has no outputs.
NEWS_SECONDS = 0.25
_PR_SET_PDEATHSIG = 1


class Rank:
    """One rank's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._received = 0

    def run(self, launched: Launched) -> None:
        """From the first message to the last."""
        settings: Settings = self._connection.recv()
        try:
            device = choose_device(settings.device)
            if device.type != "cpu":
                torch.set_num_threads(1)
            engine = load_engine(
                settings.checkpoint_dir,
                tokenizer_path=settings.tokenizer_path,
                model_args_path=settings.model_args_path,
                dtype=settings.dtype,
                device=device,
                config=settings.config,
                launched=launched,
            )
        except Exception as error:
            is_users = isinstance(error, ValueError)
            logger.error("rank %d cannot load the model: %s", launched.rank, error, exc_info=not is_users)
            self._fail(error)
        self._loop = ServiceLoop(engine, self._fail)
        self._grammars = GrammarCompiler(engine.tokenizer, engine.args.vocab_size)
        if engine.rank == 0:
            with contextlib.suppress(ValueError):  # a vocabulary without an end of text
                self._grammars.json_object()  # the first one reads the vocabulary, for which no reply should wait
        # A collection of all that was imported and loaded takes 0.1 s, in which no thread runs.
        gc.collect()
        gc.freeze()
        stats = self._loop.stats()
        self._send(Ready(limits=engine.limits, config=engine.config, device=device.type, stats=stats))
        if engine.rank == 0:
            threading.Thread(target=self._report, name="news", daemon=True).start()
        self._obey()
        self._loop.close()
        dist.barrier()  # gloo's ranks sometimes abort if one of them leaves early
        dist.destroy_process_group()

    def _obey(self) -> None:
        """Do what is asked for until the end is."""
        try:
            while (command := self._receive()) != "close":
                if isinstance(command, Add):
                    self._add(command)
                elif isinstance(command, Errand):
                    self._received += 1
                    self._loop.run_errand(command)
                elif isinstance(command, Abort):
                    self._loop.abort(command.request_id)
                elif command == "suspend":
                    self._loop.suspend()
                else:
                    self._loop.resume()
        except EOFError:  # nobody is left who could ask
            os._exit(1)

    def _add(self, command: Add) -> None:
        request = command.request
        if command.grammar is not None:
            request = dataclasses.replace(request, grammar=self._grammars.source(command.grammar))
        self._received += 1
        self._loop.add(request)

    def _receive(self) -> Command:
        command: Command = self._connection.recv()
        return command

    def _report(self) -> None:
        """Send each step's outputs, and the statistics that go with them."""
        shown = self._loop.stats()
        while True:
            outputs = self._loop.poll(NEWS_SECONDS)
            received, stats = self._received, self._loop.stats()
            if outputs or stats != shown:
                self._send(News(outputs=outputs, stats=stats, received=received))
                shown = stats

    def _fail(self, error: BaseException) -> None:
        """End this process. The group cannot go on without it, and an exception would leave the others waiting."""
        self._send(Failed(reason=str(error) or repr(error)))
        logging.shutdown()
        os._exit(1)

    def _send(self, message: Ready | Failed | News) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:  # nobody is left who could hear it
            os._exit(1)


def main(arguments: list[str]) -> None:
    # A rank that hangs in a collective would outlive the process that started it, and keep its memory.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: who started this rank ends it
    pipe, memory, listener, port = map(int, arguments)
    rank, degree = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    launched = Launched(
        rank=rank,
        world_size=degree,
        port=port,
        listener=listener,
        memory=mmap.mmap(memory, shared_layout.mapping_bytes(degree)),
    )
    os.close(memory)
    Rank(Connection(pipe)).run(launched)


if __name__ == "__main__":
    main(sys.argv[1:])
