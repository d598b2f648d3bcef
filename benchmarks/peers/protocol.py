"""Owns the protocol of a peer: one JSON object per line, over the peer's stdin and stdout.

The first line says what to load (`Setup`), and the peer answers when it is ready. Each further line is a `Work`, which
a `Done` or an error answers. The side that waits blocks in a read, so that the other has the machine to itself. Knows
no torch and no peer: it runs in any interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

ROOT = Path(__file__).resolve().parents[2]


class PeerError(RuntimeError):
    """A peer could not start, or could not do a piece of work. The message is its own last line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a peer loads. `weights` is a path in the peer's own format; `options` are for that peer only.

    `max_batch` sequences of `max_length` tokens, prompt and reply, are the largest work that will come.
    """

    weights: str
    device: str
    dtype: str
    threads: int
    max_batch: int
    max_length: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Prompts of one length, as token ids, each to be continued greedily through every end of text.

    The first token of a reply belongs to the prefill; `new_tokens` follow it.
    """

    prompts: list[list[int]]
    new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Seconds until every reply has its first token, and seconds for `new_tokens` more of each.

    `token_ids` are the replies from their first token on.
    """

    prefill_seconds: float
    decode_seconds: float
    token_ids: list[list[int]]


class Model(Protocol):
    """A peer, loaded. It warms up for work of a new shape before it starts timing."""

    version: str

    def run(self, work: Work) -> Done: ...


class Peer:
    """Our end: a peer in its own process, and its `version`. Close it, or use it in a `with`."""

    def __init__(self, python: Path, module: str, setup: Setup, *, log: Path) -> None:
        """Start `python -m module` and wait until it is ready; its other output goes to the file `log`.

        Raises:
            PeerError: it failed to start.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setup.threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # Set by a torchrun that may run us: the peer is no rank of ours.
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            self.version: str = self._ask(asdict(setup))["version"]
        except BaseException:
            self.close()
            raise

    def run(self, work: Work) -> Done:
        """Have it do `work`.

        Raises:
            PeerError: it could not.
        """
        return Done(**self._ask(asdict(work)))

    def close(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            said = [text for text in self._log.read_text(errors="replace").splitlines() if text.strip()]
            raise PeerError(said[-1].strip() if said else f"it ended with code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer


def serve(load: Callable[[Setup], Model]) -> None:
    """The peer's end: load what the first line asks for, then do what each further line asks for, until they end."""
    answers = _take_stdout()
    lines = iter(sys.stdin.readline, "")
    model = load(Setup(**json.loads(next(lines))))
    _say(answers, {"version": model.version})
    for line in lines:
        try:
            answer = asdict(model.run(Work(**json.loads(line))))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        _say(answers, answer)


def _take_stdout() -> TextIO:
    """Reserve stdout for answers: what libraries print goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
