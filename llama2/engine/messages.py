"""Owns what an engine's ranks and the process that has started them say to each other.

The pipes between them carry pickles: both ends are one program. Knows no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama2.config import EngineConfig
from llama2.engine.limits import Limits
from llama2.engine.sequence import Errand, Output, Request
from llama2.engine.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The first message to every rank: what `load_engine` takes."""

    checkpoint_dir: Path
    tokenizer_path: Path | None = None
    model_args_path: Path | None = None
    dtype: str | None = None
    device: str | None = None
    config: EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """To rank 0: `request` has no grammar of its own, but this one, in llguidance's words."""

    request: Request
    grammar: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """To rank 0."""

    request_id: str


# "close" is for every rank, the others for rank 0.
Command = Add | Errand | Abort | Literal["suspend", "resume", "close"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """From every rank, when it is. `config` is complete: what was left to the engine is decided."""

    limits: Limits
    config: EngineConfig
    device: str
    stats: EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """From a rank that cannot go on; it ends."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """From rank 0. `received` counts the requests that have reached it so far."""

    outputs: list[Output]
    stats: EngineStats
    received: int
