"""Owns where the time of a step goes: what ran on the device, for how long, and the gaps between.

Knows no engine: it profiles any function. On a CPU operators take the place of kernels.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

# How many of the longest kernels, and of the longest gaps between them, are kept.
KERNELS, GAPS = 25, 10
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that ran, in µs of the trace's own clock."""

    name: str
    start: float
    end: float


def profile(step: Callable[[], object], steps: int, device: torch.device) -> dict[str, Any]:
    """Call `step` several times under PyTorch's profiler; everything per step, see `summary`."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return summary(events, steps=steps, seconds=seconds, on_gpu=device.type == "cuda")


def summary(events: list[dict[str, Any]], *, steps: int, seconds: float, on_gpu: bool) -> dict[str, Any]:
    """What a trace in Chrome's format says of `steps` steps that took `seconds` together.

    Times are per step, except a gap's, which is of one gap. `busy` is when anything ran on the device, `idle` the rest
    between its first kernel and its last; `host` is when the host did not wait. Profiling itself takes time, mostly on
    the host: trust the shares, and the kernels' own times.
    """
    spans = [
        Span(name=event["name"], start=event["ts"], end=event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("cat") in (_ON_GPU if on_gpu else ("cpu_op",))
    ]
    spans.sort(key=lambda span: (span.start, -span.end))
    if not on_gpu:
        spans = _outermost(spans)
    host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    waited = sum(event["dur"] for event in host if event["name"] in _WAITS) / 1e3
    busy, gaps = _gaps(spans)
    return {
        "steps": steps,
        "milliseconds_per_step": 1e3 * seconds / steps,
        "busy_milliseconds_per_step": busy / 1e3 / steps,
        "idle_milliseconds_per_step": sum(gap["microseconds"] for gap in gaps) / 1e3 / steps,
        "host_milliseconds_per_step": (1e3 * seconds - waited) / steps,
        "launches_per_step": sum(event["name"] in _LAUNCHES for event in host) / steps,
        "gaps": sorted(gaps, key=lambda gap: -gap["microseconds"])[:GAPS],
        "kernels": _totals(spans, steps)[:KERNELS],
    }


def _totals(spans: list[Span], steps: int) -> list[dict[str, Any]]:
    took: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        took[span.name].append(span.end - span.start)
    total = sum(map(sum, took.values()))
    rows = [
        {
            "name": name,
            "calls_per_step": len(times) / steps,
            "microseconds_per_step": sum(times) / steps,
            "percent": 100 * sum(times) / total if total else 0.0,
        }
        for name, times in took.items()
    ]
    return sorted(rows, key=lambda row: -row["microseconds_per_step"])


def _gaps(spans: list[Span]) -> tuple[float, list[dict[str, Any]]]:
    """How long anything ran, and the gaps: between which two, and how long."""
    busy, gaps = 0.0, []
    latest: Span | None = None
    for span in spans:
        if latest is None:
            busy += span.end - span.start
        else:
            if span.start > latest.end:
                gaps.append({"microseconds": span.start - latest.end, "after": latest.name, "before": span.name})
            busy += max(0.0, span.end - max(span.start, latest.end))
        if latest is None or span.end > latest.end:
            latest = span
    return busy, gaps


def _outermost(spans: list[Span]) -> list[Span]:
    """An operator's time includes the operators that it calls."""
    kept: list[Span] = []
    for span in spans:
        if not kept or span.end > kept[-1].end:
            kept.append(span)
    return kept
