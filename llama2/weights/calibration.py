"""Owns GPTQ with calibration: the text, and gptqmodel's run over it, in an environment of its own.

Reads and writes Hugging Face folders. Knows neither the source of a conversion nor its target.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.progress import progress
from llama2.text.tokenizer import Tokenizer
from llama2.weights.kinds import CALIBRATION_FILE

# Where `make gptq` installs the library: it needs other versions of the same packages.
ENVIRONMENT = Path(".venv-gptq")

_WORKER = Path(__file__).with_name("gptq_worker.py")
_LENGTH = 2048
# Of more tokens a part is taken, evenly from all of the file: 128 sequences of 2048 are GPTQ's own measure.
_MOST = 128 * _LENGTH
_FEWEST = 1024
_LARGEST_FILE = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """The library, found, and the file to calibrate with, read.

    Attributes:
        documents: the file's text, or that of each line of a JSONL file.
        python: the interpreter of the library's environment.
        version: of the library.
    """

    path: Path
    sha256: str
    documents: tuple[str, ...]
    python: Path
    version: str

    @classmethod
    def open(cls, path: Path | str) -> Gptq:
        """Raises ValueError if the file holds no text, or the library is not installed."""
        path = Path(path)
        data = _read(path)
        python = (ENVIRONMENT / "bin" / "python").absolute()
        query = "import importlib.metadata as metadata; print(metadata.version('gptqmodel'))"
        try:
            asked = subprocess.run([python, "-I", "-c", query], capture_output=True, text=True)
        except OSError:
            asked = None
        if asked is None or asked.returncode:
            raise ValueError(
                "--quantize gptq needs gptqmodel in an environment of its own, "
                f"{python.parents[1]}: make gptq sets it up"
            )
        return cls(
            path=path,
            sha256=hashlib.sha256(data).hexdigest(),
            documents=_documents(path, data),
            python=python,
            version=asked.stdout.strip(),
        )

    def quantize(self, work: Path, tokenizer: Tokenizer, *, group_size: int, layers: int, context: int) -> Path:
        """Quantize the model in `work / "plain"`, in Hugging Face's format, and return the folder of the result.

        Writes `calibration.json` into `work`, and removes `plain`.

        Args:
            context: tokens that the model takes at once.

        Raises:
            ValueError: the file has too few tokens, or the library failed.
        """
        sequences = self.sequences(tokenizer, min(context, _LENGTH))
        task = {"group_size": group_size, "sequences": sequences}
        (work / "task.json").write_text(json.dumps(task), encoding="utf-8")
        log = work / "log"
        with (
            progress(desc="calibrating", total=layers, unit="layer", leave=True) as bar,
            _running([str(self.python), "-I", str(_WORKER), str(work)], log) as process,
        ):
            assert process.stdout is not None
            for _ in process.stdout:
                bar.update(1)
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line[:1].isalpha() and "Error" in line), lines[-1])
            raise ValueError(f"gptqmodel {self.version} ended with exit code {process.returncode}: {reason[:300]}")
        about: dict[str, Any] = {
            "method": "gptq",
            "library": f"gptqmodel {self.version}",
            "group_size": group_size,
            "file": self.path.name,
            "sha256": self.sha256,
            "sequences": len(sequences),
            "tokens": sum(map(len, sequences)),
        }
        (work / CALIBRATION_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(work / "plain")
        return work / "result"

    def sequences(self, tokenizer: Tokenizer, length: int) -> list[list[int]]:
        """Ids, up to `length` of a document at a time, after what a prompt begins with.

        Raises:
            ValueError: they are too few.
        """
        begin, sequences = tokenizer.encode_prompt(""), []
        step = length - len(begin)
        for document in self.documents:
            ids = tokenizer.encode(document)
            sequences += [[*begin, *ids[at : at + step]] for at in range(0, len(ids), step)]
        total = sum(map(len, sequences))
        if total < _FEWEST:
            raise ValueError(f"--calibration {self.path} has {total} tokens: at least {_FEWEST} are needed")
        return sequences[:: -(-total // _MOST)]


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise ValueError(f"--calibration {path} cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST_FILE:
        raise ValueError(
            f"--calibration {path} has more than {_LARGEST_FILE >> 20} MiB: {_MOST} tokens are used at most"
        )
    return data


def _documents(path: Path, data: bytes) -> tuple[str, ...]:
    """Raises ValueError if the file is empty, no UTF-8, or a line of JSONL holds no text."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--calibration {path} is no text in UTF-8") from None
    documents = tuple(_texts(path, text.splitlines()) if path.suffix == ".jsonl" else [text])
    if not any(map(str.strip, documents)):
        raise ValueError(f"--calibration {path} is empty")
    return documents


def _texts(path: Path, lines: Sequence[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'--calibration {path}: line {number} must be like {{"text": "..."}}')
            yield text


@contextlib.contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process whose stderr goes to a file, and that is ended, with all that it has started, when this is left."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=alone,
            start_new_session=True,
        )
    with process:
        try:
            yield process
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
