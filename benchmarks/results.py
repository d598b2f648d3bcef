"""Owns every benchmark's result: one JSON file that says what was measured, where, and with which code.

Knows neither what a benchmark measures nor torch, and nothing that identifies the machine: only its hardware.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import llama2

ROOT = Path(__file__).resolve().parent.parent
# Where a command writes unless told otherwise. What docs/performance.md quotes was written to benchmarks/results/.
RESULTS = ROOT / "build" / "results"
_LIBRARIES = ("torch", "numpy", "transformers", "torchserve")


def machine() -> dict[str, Any]:
    """The CPU's name, vendor, family and model, cores that this process may use, memory in GiB, the names of the GPUs.

    A CPU's name may say no more than "AMD EPYC"; its family and model tell one generation from another.
    """
    cpu = _cpu()
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_vendor": cpu.get("vendor_id"),
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpus": _said_by("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of the installed libraries that affect speed."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def commit() -> str:
    """The commit of the code that runs, with "+changes" behind it if files differ from it; "unknown" outside git.

    Result files do not count as changes: a second benchmark in a row runs the same code.
    """
    code = ("-C", str(ROOT))
    head = _said_by("git", *code, "rev-parse", "--short=12", "HEAD").strip()
    changes = _said_by("git", *code, "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head + ("+changes" if changes else "") if head else "unknown"


def sources() -> str:
    """A hash (sha256) of the code that computes a model, the files of llama2/: the same wherever it is installed."""
    digest = hashlib.sha256()
    folder = Path(llama2.__file__).parent
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def save(path: Path | str, kind: str, settings: Mapping[str, Any], figures: Any) -> Path:
    """Write one result file and return its path; creates folders, and replaces an earlier file of that name.

    Args:
        path: the file, usually below `RESULTS`.
        kind: the benchmark that measured, such as "offline".
        settings: its options: enough to run it again.
        figures: the results of every round, with units in the keys. All of it must be JSON.
    """
    path = Path(path)
    content = {
        "kind": kind,
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    # Atomically: a benchmark that writes after each figure may be killed at any time.
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    with contextlib.suppress(OSError):
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


@functools.cache
def _said_by(*command: str) -> str:
    """What a command prints, asked once; nothing where it is not installed or fails."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return ""
