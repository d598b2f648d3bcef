"""Runs all GPU checks and measurements, one step after the other, within the time of a rented machine.

    python -m benchmarks.gpu_steps OUT

Needs only torch, triton and numpy: a step that needs more is named and skipped where that is missing. Every step has a
time limit, and the next may use what it leaves. What a step wrote before its end stays.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import GpuReport
from benchmarks.results import RESULTS, ROOT

# All steps together; a rented machine may give 600, some of which go to its start and to copying back.
SECONDS = 525
# How long a process has to end before it is killed.
GRACE = 4
# A step with less time left is not started: importing torch takes this long.
LEAST = 10
# Named if missing; steps that need them are skipped.
OPTIONAL = (
    *("pytest", "hypothesis", "fire", "gguf", "psutil", "tqdm", "tokenizers", "matplotlib", "transformers"),
    *("safetensors", "yaml", "sentencepiece", "llguidance", "pydantic"),
)
GPU_TESTS = (
    "tests/llama2/test_gpu.py",
    "tests/llama2/kernels/test_cuda.py",
    "tests/llama2/kernels/test_cuda_quantized.py",
    "tests/llama2/engine/test_graphs.py::test_a_gpu_replies_the_same_with_graphs_and_without",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Commands (arguments of the interpreter) that run at the same time, for `limit` seconds at most.

    They need the packages `needs`. OUT in an argument is the folder of results.
    """

    name: str
    limit: int
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()


_ENGINE = ("-m", "benchmarks.gpu_run", "--out", "OUT", "--max_step_tokens", "2048")
STEPS = (
    Step(
        name="tests",
        limit=90,
        # In parallel: most of their time goes into compiling kernels, on one core each.
        commands=tuple(("-m", "pytest", "-q", "-p", "no:cacheprovider", test) for test in GPU_TESTS),
        needs=("pytest",),
    ),
    Step(name="kernels", limit=120, commands=(("-m", "benchmarks.gpu_kernels", "--out", "OUT", "--seconds", "105"),)),
    Step(
        name="7b",
        limit=140,
        commands=(
            (
                *(*_ENGINE, "--shape", "7b", "--profiles", "1,8,64"),
                *("--cells", "1x128,64x1024,8x128,8x1024,1x1024,64x128,1x2048,1x4096"),
            ),
        ),
    ),
    Step(name="13b", limit=60, commands=((*_ENGINE, "--shape", "13b", "--cells", "1x128,1x2048"),)),
    Step(
        name="peers",
        limit=105,
        commands=(("-m", "benchmarks.gpu_peers", "--out", "OUT"),),
        needs=("transformers",),
    ),
)


def main(arguments: list[str] | None = None, steps: Sequence[Step] = STEPS) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "out", nargs="?", type=Path, default=RESULTS / "gpu", metavar="OUT", help="the folder of results"
    )
    out = parser.parse_args(arguments).out.resolve()
    deadline = time.monotonic() + SECONDS
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    print(f"not installed: {', '.join(missing) or 'nothing'}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "gpu.txt"):
        (out / name).unlink(missing_ok=True)
    done: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        later = sum(other.limit for other in steps[index + 1 :])
        done.append(_run(step, out, seconds=deadline - later - time.monotonic(), missing=missing))
        GpuReport(out).put("steps", {"seconds": SECONDS}, {"not_installed": missing, "steps": done})
    print((out / "gpu.txt").read_text(encoding="utf-8"))
    packed = _pack(out)
    print(f"wrote {packed}, {packed.stat().st_size:,} bytes")


def _run(step: Step, out: Path, *, seconds: float, missing: Sequence[str]) -> dict[str, Any]:
    """Run one step; returns how it ended, as JSON. The exit status is that of the first command that failed."""
    lacks = [name for name in step.needs if name in missing]
    if lacks or seconds < LEAST:
        reason = f"not installed: {', '.join(lacks)}" if lacks else "no time left"
        print(f"== {step.name} is left out: {reason}", flush=True)
        return {"step": step.name, "left_out": reason}
    print(f"== {step.name}, for {seconds:.0f} s at most", flush=True)
    started = time.monotonic()
    logs = [out / f"{step.name}{f'-{index}' * (len(step.commands) > 1)}.log" for index in range(len(step.commands))]
    commands = [[part.replace("OUT", str(out)) for part in command] for command in step.commands]
    processes = []
    try:
        for command, log in zip(commands, logs, strict=True):
            with log.open("w") as file:
                # In its own session, so that what it starts ends with it.
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, start_new_session=True
                    )
                )
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, started + seconds - GRACE - time.monotonic()))
    finally:
        for process in processes:
            _end(process)
    statuses = [process.returncode for process in processes]
    for log in logs:
        print("\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]), flush=True)
    took = round(time.monotonic() - started, 1)
    print(f"== {step.name}: exit status {max(statuses, key=abs)} after {took} s", flush=True)
    return {
        "step": step.name,
        "commands": [" ".join(command) for command in step.commands],
        "exit_status": max(statuses, key=abs),
        "seconds": took,
        "limit_s": round(seconds, 1),
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it is running, and all that it has started."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _pack(out: Path) -> Path:
    """Pack the folder into one file beside it."""
    packed = out.with_name(f"{out.name}.tar.gz")
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(out, arcname=out.name)
    return packed


if __name__ == "__main__":
    main()
