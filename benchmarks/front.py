"""Owns the cost of TorchServe and the handler: the same work through the server and by the engine alone, compared."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.load import Load, LoadError, Work
from benchmarks.programs import complete
from benchmarks.results import ROOT

CLIENTS = 32
ALONE = 20  # requests of one client
WANTED_RATIO = 0.9
WANTED_MS = 15


def engine_alone(checkpoint: Path, server: Mapping[str, Any], work: Work) -> dict[str, float]:
    """tokens/s and ms to the first token without a server, on the same ranks, threads and sizes.

    Args:
        server: the settings of the server to compare with, as in a model-config.yaml.

    Raises:
        LoadError: the engine failed.
    """
    handler, degree = server["handler"], server["handler"]["tensor_parallel_size"]
    options: dict[str, Any] = {
        "checkpoint": checkpoint,
        "clients": CLIENTS,
        "requests": work.requests,
        "alone": ALONE,
        "prompt_tokens": work.prompt_tokens,
        "output_tokens": work.output_tokens,
        **{name: handler[name] for name in ("max_seq_len", "max_batch_size", "max_step_tokens")},
    }
    if server["deviceType"] == "cpu":
        options["device"] = "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(degree), "-m", "benchmarks.engine_only"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environ = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // degree))}
    done = complete(command, cwd=ROOT, environ=environ)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise LoadError(f"the engine alone failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


def front_cost(
    alone: Sequence[Mapping[str, float]], many: Load, one: Load, cores: Mapping[str, float]
) -> dict[str, Any]:
    """What the front end costs.

    Args:
        alone: the engine's own figures, one per measurement; the best counts.
        many: the load of `CLIENTS` clients.
        one: the load of a single client.
        cores: how many processors each part kept busy during the load of `CLIENTS` clients; see cpu_shares.py.
    """
    best = {"tokens_per_s": max(run["tokens_per_s"] for run in alone), "ttft_ms": min(run["ttft_ms"] for run in alone)}
    return {
        "engine_alone": [dict(run) for run in alone],
        "load": dataclasses.asdict(many),
        "ratio_to_engine": many.tokens_per_s / best["tokens_per_s"],
        "ttft_ms_of_one": one.ttft_ms.get("p50"),
        "added_ttft_ms": one.ttft_ms["p50"] - best["ttft_ms"] if one.ttft_ms else None,
        "cores": dict(cores),
    }
