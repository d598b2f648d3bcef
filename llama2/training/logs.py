"""Owns what a run tells about itself: `log.csv`, TensorBoard's logs, and a plot of the losses. Knows no model."""

from __future__ import annotations

import csv
import importlib.util
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llama2.errors import InvalidValue

LOG_FILE, PLOT_FILE = "log.csv", "loss.png"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Of the steps since the last row. Losses are means over tokens, in nats; `tokens` are all that were computed."""

    step: int
    epoch: float
    loss: float | None = None
    validation_loss: float | None = None
    learning_rate: float | None = None
    gradient_norm: float | None = None
    tokens: int | None = None
    seconds: float | None = None


def check_tensorboard() -> None:
    """
    Raises:
        InvalidValue: its package is not there.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InvalidValue("tensorboard", "needs a package: pip install tensorboard")


class Log:
    """The logs of a run in its folder; of a resumed one, rows after `last_step` are forgotten."""

    def __init__(self, folder: Path, *, last_step: int, tensorboard: bool) -> None:
        self._folder = folder
        self._rows = [row for row in _read(folder / LOG_FILE) if row["step"] <= last_step]
        self._write()
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def add(self, row: Row) -> None:
        values = asdict(row)
        self._rows.append(values)
        with (self._folder / LOG_FILE).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, list(values)).writerow(values)
        if self._tensorboard is not None:
            for name, value in values.items():
                if value is not None and name != "step":
                    self._tensorboard.add_scalar(name, value, row.step)

    def close(self) -> None:
        """Draw the losses, where matplotlib is."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            logger.info("no %s: pip install matplotlib", PLOT_FILE)
            return
        axes = (figure := Figure(figsize=(7, 4))).subplots()
        for name, style in (("loss", "-"), ("validation_loss", "o-")):
            points = [(row["step"], row[name]) for row in self._rows if row[name] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "))
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.legend()
        figure.savefig(self._folder / PLOT_FILE, dpi=120, bbox_inches="tight")

    def _write(self) -> None:
        with (self._folder / LOG_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(self._rows)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {name: (int if name in ("step", "tokens") else float)(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(file)
        ]
