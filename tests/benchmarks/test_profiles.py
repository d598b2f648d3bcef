"""Where a step's time went, by a known trace and by one of this machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.profiles import KERNELS, profile, summary


def event(name: str, category: str, start: float, duration: float) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


TRACE = [
    {"ph": "M", "name": "process_name"},
    event("aten::linear", "cpu_op", 0, 900),
    event("cudaGraphLaunch", "cuda_runtime", 0, 5),
    event("cudaLaunchKernel", "cuda_runtime", 6, 5),
    event("cudaEventSynchronize", "cuda_runtime", 20, 600),
    event("linear", "kernel", 100, 70),
    event("linear", "kernel", 130, 20),  # beside the first, on another stream
    event("norm", "kernel", 200, 10),
    event("copy", "gpu_memcpy", 310, 10),
]


def test_a_trace_of_a_gpu() -> None:
    found = summary(TRACE, steps=2, seconds=0.001, on_gpu=True)
    assert found["milliseconds_per_step"] == 0.5
    assert found["busy_milliseconds_per_step"] == pytest.approx((70 + 10 + 10) / 2e3)
    assert found["idle_milliseconds_per_step"] == pytest.approx((30 + 100) / 2e3)
    assert found["host_milliseconds_per_step"] == pytest.approx(0.2), "1 ms, of which it waited 0.6"
    assert found["launches_per_step"] == 1
    assert found["gaps"] == [
        {"microseconds": 100, "after": "norm", "before": "copy"},
        {"microseconds": 30, "after": "linear", "before": "norm"},
    ]
    assert found["kernels"][0] == {
        "name": "linear", "calls_per_step": 1, "microseconds_per_step": 45, "percent": pytest.approx(900 / 11)
    }  # fmt: skip


def test_on_a_cpu_an_operator_counts_once_with_those_inside_it() -> None:
    trace = [event("linear", "cpu_op", 0, 100), event("matmul", "cpu_op", 10, 80), event("add", "cpu_op", 100, 10)]
    kernels = summary(trace, steps=1, seconds=1, on_gpu=False)["kernels"]
    assert [(one["name"], one["microseconds_per_step"]) for one in kernels] == [("linear", 100), ("add", 10)]


def test_nothing_ran() -> None:
    found = summary([], steps=1, seconds=1, on_gpu=True)
    assert (found["kernels"], found["gaps"], found["busy_milliseconds_per_step"]) == ([], [], 0)


def test_what_is_called_is_profiled() -> None:
    x = torch.randn(64, 64)
    found = profile(lambda: x @ x, 3, torch.device("cpu"))
    product = next(one for one in found["kernels"] if "matmul" in one["name"])
    assert product["calls_per_step"] == 1
    assert 0 < found["busy_milliseconds_per_step"] <= found["milliseconds_per_step"]
    assert len(found["kernels"]) <= KERNELS
