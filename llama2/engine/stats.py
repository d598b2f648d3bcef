"""Owns what an engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of rank 0's engine. `last_step_at` is a time of `time.monotonic`, which all processes of a host share;
    None before the first step.

    `prompt_tokens` counts those of all sequences started, `cached_tokens` those among them found in the prefix cache.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    last_step_at: float | None
