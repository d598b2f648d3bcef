"""Owns a run's folder: checkpoints that it can be resumed from, and the adapter. Each appears when it is complete.

    adapter/            PEFT's files, of the lowest validation loss so far; where none is measured, the newest
    checkpoint-000100/  after step 100: adapter/, run.json, and for each rank what it trains with

Knows no model and no data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from llama2.parallel.process_group import gather_objects
from llama2.text.tokenizer_files import read_small_json
from llama2.weights.staging import StagedFolder

T = TypeVar("T")

ADAPTER_FOLDER = "adapter"
_RUN_FILE = "run.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is: steps done, and the validations. Its place in the data follows from the step."""

    step: int = 0
    best_loss: float | None = None
    since_best: int = 0


class RunFolder:
    """All ranks make the same calls. `run` is what a run is, as JSON: one that is resumed must be the same."""

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self._run = json.loads(json.dumps(run))
        self._first = dist.get_rank() == 0

    def prepare(self, *, resume: bool) -> None:
        """Make the folder; of a run that begins, nothing may be in it.

        Raises:
            ValueError: there is another run in it.
        """
        if not resume and self._checkpoints():
            raise ValueError(f"{self.folder} has checkpoints: go on with --resume, or choose another output_dir")
        together(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def save(
        self,
        progress: Progress,
        state: Mapping[str, Any],
        write_adapter: Callable[[Path], None],
        *,
        keep: int,
    ) -> None:
        """Write a checkpoint, `state` being this rank's, and remove all but the newest `keep`.

        Raises:
            ValueError: on all ranks, if one could not write; what was there stays.
        """
        staged = StagedFolder(self.folder / f"{_PREFIX}{progress.step:06d}")

        def begin() -> None:
            if self._first:
                staged.recover()
                staged.open(size=0)

        def write() -> None:
            torch.save(dict(state), staged.partial / f"rank-{dist.get_rank()}.pt")
            if self._first:
                write_adapter(staged.partial / ADAPTER_FOLDER)
                run = {"progress": asdict(progress), "run": self._run}
                (staged.partial / _RUN_FILE).write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")

        def end() -> None:
            if self._first:
                staged.commit()
                for old in self._checkpoints()[:-keep]:
                    shutil.rmtree(old)

        try:
            for action in (begin, write, end):
                together(action)
        except ValueError:
            if self._first:
                staged.discard()
            raise

    def load(self) -> tuple[Progress, dict[str, Any]] | None:
        """The newest checkpoint, with this rank's state; None where there is none.

        Raises:
            ValueError: it is damaged, or of another run.
        """
        checkpoints = self._checkpoints()
        if not checkpoints:
            return None
        return together(lambda: self._read(checkpoints[-1]))

    def _read(self, folder: Path) -> tuple[Progress, dict[str, Any]]:
        stored = read_small_json(folder / _RUN_FILE)
        run = stored.get("run", {})
        for name, value in self._run.items():
            if run.get(name) != value:
                raise ValueError(
                    f"{folder} is of another run: its {name} is {run.get(name)}, and here it is {value}; choose "
                    "another output_dir for a new run"
                )
        path = folder / f"rank-{dist.get_rank()}.pt"
        try:
            return Progress(**stored["progress"]), torch.load(path, weights_only=True)
        except Exception as error:  # whatever torch makes of a damaged file
            raise ValueError(f"{path} cannot be read: {error}") from None

    def _checkpoints(self) -> list[Path]:
        """The complete ones, the newest last."""
        found = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def together(action: Callable[[], T]) -> T:
    """Do what may fail on one rank alone.

    Raises:
        ValueError: on all ranks, if it failed on one.
    """
    problem = result = None
    try:
        result = action()
    except (OSError, ValueError, RuntimeError) as error:
        problem = str(error)
    for rank, theirs in enumerate(gather_objects(problem)):
        if theirs is not None:
            raise ValueError(theirs if dist.get_world_size() == 1 else f"rank {rank}: {theirs}")
    return cast(T, result)
