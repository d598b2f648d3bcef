"""Owns the results of `benchmarks/gpu.sh`: `gpu.json`, written step by step, and its tables in `gpu.txt`.

Measures nothing. Each step adds sections, and replaces only its own: however a step ends, what it has written stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.offline_report import measured_table, peer_table
from benchmarks.results import save
from benchmarks.tables import table

# How many kernels of a profile the tables show, and the width of their names; the JSON file has more.
SHOWN_KERNELS, NAME_WIDTH = 8, 60


class GpuReport:
    """The two files in a folder, which need not exist yet."""

    def __init__(self, folder: Path | str) -> None:
        self._path = Path(folder, "gpu.json")

    def figures(self) -> dict[str, Any]:
        """All sections written so far."""
        figures: dict[str, Any] = self._read().get("figures", {})
        return figures

    def put(self, section: str, settings: Mapping[str, Any], figures: Any) -> None:
        """Write a section, in place of an earlier one of that name. All of it must be JSON."""
        former = self._read()
        everything = {**former.get("figures", {}), section: figures}
        save(self._path, "gpu", {**former.get("settings", {}), section: dict(settings)}, everything)
        self._path.with_suffix(".txt").write_text(as_text(everything), encoding="utf-8")

    def _read(self) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        content: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
        return content


def as_text(figures: Mapping[str, Any]) -> str:
    """Every section as a table. What ran, and how it ended, comes last, where a terminal shows it."""
    parts = []
    if "kernels" in figures:
        parts.append(_kernels(figures["kernels"]))
    for section, content in figures.items():
        if section.startswith("engine "):
            parts.append(_engine(section.removeprefix("engine "), content))
    if "peers" in figures:
        parts += [peer_table(name, peer) for name, peer in figures["peers"].items()]
    if "steps" in figures:
        parts.append(_steps(figures["steps"]))
    return "\n\n".join(parts) + "\n"


def _kernels(content: Mapping[str, Any]) -> str:
    rows = [row for row in content["rows"] if "left_out" not in row]
    lines = [
        (
            row["kernel"].ljust(NAME_WIDTH),
            f"{row['microseconds']:.1f}",
            f"{row['rate']:,.0f}",
            row["unit"],
            f"{row['percent_of_ceiling']:.0f}",
        )
        for row in rows
    ]
    reasons: dict[str, list[str]] = {}
    for row in content["rows"]:
        if "left_out" in row:
            reasons.setdefault(row["left_out"], []).append(row["kernel"])
    left_out = [f"left out, {reason}: {'; '.join(kernels)}" for reason, kernels in reasons.items()]
    columns = ("kernel".ljust(NAME_WIDTH), "µs", "rate", "of", "% of ceiling")
    return "\n".join((_ceilings("kernels", content["ceilings"]), table(columns, lines), *left_out))


def _engine(name: str, content: Mapping[str, Any]) -> str:
    parts = [_ceilings(name, content["ceilings"])]
    if "start" in content:
        parts.append(", ".join(f"{key.replace('_', ' ')} {value:,.3g}" for key, value in content["start"].items()))
    parts.append(measured_table(content["rows"]))
    for what, profile in content.get("profiles", {}).items():
        parts.append(f"\n{_profile(f'{name}, {what}', profile)}")
    return "\n".join(parts)


def _profile(title: str, profile: Mapping[str, Any]) -> str:
    if "left_out" in profile:
        return f"{title} is left out: {profile['left_out']}"
    sums = (
        f"{title}, ms per step under the profiler: {profile['milliseconds_per_step']:.2f}, "
        f"kernels {profile['busy_milliseconds_per_step']:.2f}, "
        f"gaps between them {profile['idle_milliseconds_per_step']:.2f}, "
        f"host {profile['host_milliseconds_per_step']:.2f}; "
        f"{profile['launches_per_step']:.0f} launches"
    )
    lines = [
        (
            one["name"][:NAME_WIDTH].ljust(NAME_WIDTH),
            f"{one['calls_per_step']:.1f}",
            f"{one['microseconds_per_step']:,.1f}",
            f"{one['percent']:.1f}",
        )
        for one in profile["kernels"][:SHOWN_KERNELS]
    ]
    gaps = [
        f"gap of {gap['microseconds']:.1f} µs between {gap['after'][:40]} and {gap['before'][:40]}"
        for gap in profile["gaps"][:3]
    ]
    return "\n".join((sums, table(("kernel".ljust(NAME_WIDTH), "calls", "µs", "%"), lines), *gaps))


def _steps(content: Mapping[str, Any]) -> str:
    lines = [
        (step["step"], str(step["exit_status"]), str(step["seconds"]), str(step["limit_s"]))
        for step in content["steps"]
        if "left_out" not in step
    ]
    reasons = [f"{step['step']} is left out: {step['left_out']}" for step in content["steps"] if "left_out" in step]
    missing = ", ".join(content["not_installed"]) or "nothing"
    return "\n".join((f"not installed: {missing}", table(("step", "exit status", "seconds", "limit"), lines), *reasons))


def _ceilings(title: str, ceilings: Mapping[str, float]) -> str:
    return (
        f"== {title}; ceilings, measured now: copy {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"read {ceilings['read_bytes_per_second'] / 1e9:,.0f} GB/s, "
        f"product {ceilings['flops_per_second'] / 1e12:,.2f} TFLOP/s"
    )
