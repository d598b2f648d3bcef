"""A recording on a CPU: the procedure itself, which works on the same fixed tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rerun:
    """Runs it once when it is recorded, and again at each replay."""

    procedure: Callable[[], None]

    def __post_init__(self) -> None:
        self.procedure()

    def replay(self) -> None:
        self.procedure()

    def reset(self) -> None: ...
