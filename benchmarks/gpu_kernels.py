"""Measures the GPU's kernels one by one, against PyTorch's own and against variants of themselves.

    python -m benchmarks.gpu_kernels

A decoding step costs the sum of these: they say which kernel to work on, which rows belong in `STREAMED_ROWS` of
llama2/kernels/cuda/kernels.py, and which values are right there. Needs only torch, triton and numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ceilings import measure_ceilings
from benchmarks.gpu_report import GpuReport
from benchmarks.limits import Rates
from benchmarks.results import RESULTS
from benchmarks.shapes import SHAPES
from benchmarks.sweeps import attention, products, quantized, sampling, steps
from benchmarks.sweeps.bench import Bench
from llama2.dtypes import read_dtype
from llama2.flags import argument
from llama2.parallel.process_group import choose_device, init_process_group

# The engine's own choices first, then variants: time may run out.
PARTS = (
    products.measure,
    attention.measure,
    quantized.measure,
    steps.measure,
    sampling.measure,
    products.sweep,
    attention.sweep_decoding,
    attention.sweep_prompts,
)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parser().parse_args(arguments)
    deadline = time.monotonic() + settings.seconds
    device, dtype, args = choose_device(settings.device), getattr(torch, settings.dtype), SHAPES[settings.shape]
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(_line(row), flush=True)

    if settings.compile is not None:
        any_rates = Rates(bytes_per_second=1, flops_per_second=1)
        share = (settings.compile, settings.compilers)
        bench = Bench(device, dtype, any_rates, deadline=deadline, keep=keep, compiles=share)
        with torch.inference_mode():
            for part in PARTS:
                part(bench, args)
        return
    if device.type == "cuda":
        _compile_ahead(arguments, settings.compilers, deadline=time.monotonic() + settings.seconds / 2)
    init_process_group(device)
    ceilings = measure_ceilings(device, dtype)
    bench = Bench(device, dtype, ceilings.rates, deadline=deadline, keep=keep)
    for part in PARTS:
        with torch.inference_mode():
            part(bench, args)
        GpuReport(settings.out).put(
            "kernels",
            {"shape": settings.shape, "device": settings.device, "dtype": settings.dtype},
            {"ceilings": dataclasses.asdict(ceilings), "rows": rows},
        )
    print(f"wrote {settings.out}/gpu.json")


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=(__doc__ or "").split("\n")[0])
    known.add_argument("--shape", choices=SHAPES, default="7b", help="whose layers' sizes")
    known.add_argument("--seconds", type=float, default=100, help="what is not begun by then is left out")
    known.add_argument("--compilers", type=int, default=8, help="processes that compile before anything is measured")
    known.add_argument("--compile", type=int, metavar="I", help="be one of these, from 0 on, and measure nothing")
    known.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    known.add_argument("--dtype", type=argument(read_dtype), default="bfloat16")
    known.add_argument("--out", type=Path, default=RESULTS / "gpu", help="the folder of gpu.json")
    return known


def _compile_ahead(arguments: list[str], compilers: int, *, deadline: float) -> None:
    """Compile every kernel in several processes at once: compiling takes longer than measuring.

    Triton caches them on disk. This process compiles what is not done by `deadline`.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_kernels", *arguments, "--compile"]
    processes = [subprocess.Popen([*command, str(index)]) for index in range(compilers)]
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in processes:
                process.wait(max(0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _line(row: dict[str, Any]) -> str:
    if "left_out" in row:
        return f"{row['kernel']} is left out: {row['left_out']}"
    return f"{row['kernel']}: {row['microseconds']:.1f} µs, {row['percent_of_ceiling']:.0f} % of the ceiling"


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
