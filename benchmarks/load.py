"""Owns one load on a server that speaks OpenAI's API: has guidellm make it, and reads its report.

Knows neither how the server came up nor which loads are worth making.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.programs import complete
from benchmarks.results import ROOT

GUIDELLM = ROOT / ".venv-clients" / "bin" / "guidellm"
_METRICS = {
    "ttft_ms": ("time_to_first_token_ms", 1),
    "itl_ms": ("inter_token_latency_ms", 1),
    "total_ms": ("request_latency", 1000),
}
PERCENTILES = ("p50", "p90", "p99")


class LoadError(RuntimeError):
    """guidellm is missing or failed; the message is for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A server: `url` with the model's version and without /v1, and what guidellm counts tokens with."""

    url: str
    key: str
    model: str
    tokenizer: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The requests of a load: streamed completions of synthetic prompts of exact lengths. It ends after
    `requests` of them, or after `seconds`: those still in flight are cut off."""

    prompt_tokens: int
    output_tokens: int
    requests: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The results of one load. A latency holds p50, p90 and p99, in ms, of the requests that were answered; the
    inter-token latency of a request is the mean over its tokens. Empty where none was answered.

    Either `clients` sent requests, each as soon as it had its last reply, or `offered_per_s` Poisson arrivals were
    planned and `sent_per_s` sent. `unfinished` were cut off at the end, `failed` were refused or broke off.
    """

    clients: int | None
    offered_per_s: float | None
    sent_per_s: float | None
    answered: int
    failed: int
    unfinished: int
    answered_per_s: float
    tokens_per_s: float
    ttft_ms: Mapping[str, float]
    itl_ms: Mapping[str, float]
    total_ms: Mapping[str, float]
    dollars_per_1k_tokens: float | None


def check_installed(guidellm: Path) -> None:
    """Raises LoadError, with the command that installs it, if the program is not there."""
    if not guidellm.exists():
        raise LoadError(f"{guidellm} does not exist: make .venv-clients/.ready installs it")


def offer(
    target: Target, work: Work, *, clients: int | None = None, rate: float | None = None, seed: int, guidellm: Path
) -> dict[str, Any]:
    """Make one load and return guidellm's report of it.

    Args:
        clients: how many send requests at any time, or
        rate: requests per second, Poisson arrivals.
        seed: of the prompts and arrivals. Use a new one for each load, or the prompts are cached from the last one.
        guidellm: the program.

    Raises:
        LoadError: it failed.
    """
    profile = f"kind=concurrent,streams={clients}" if rate is None else f"kind=poisson,rate={rate:g}"
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        report = Path(folder, "report.json")
        server = f"target={target.url},model={target.model},api_key={target.key}"
        options = [
            ("backend", f"kind=openai_http,{server},request_format=/v1/completions"),
            ("tokenizer", f"kind=huggingface_auto,model={target.tokenizer.resolve()}"),
            ("data", f"kind=synthetic_text,prompt_tokens={work.prompt_tokens},output_tokens={work.output_tokens}"),
            ("profile", profile),
            ("constraint", f"kind=max_requests,count={work.requests}"),
            ("constraint", f"kind=max_duration,seconds={work.seconds:g}"),
            ("seed", f"kind=static,value={seed}"),
            ("output", f"kind=json,path={report}"),
        ]
        command = [str(guidellm), "run", "--disable-console"]
        command += [word for name, value in options for word in (f"--{name}", value)]
        # One process generates some thousand tokens/s of load, and leaves the processors to the server beside it.
        environ = {"GUIDELLM__MAX_WORKER_PROCESSES": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
        done = complete(command, cwd=folder, environ=environ)
        if done.returncode or not report.exists():
            raise LoadError(f"guidellm failed:\n{(done.stdout + done.stderr)[-2000:]}")
        figures: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return figures


def read_report(
    report: Mapping[str, Any],
    *,
    clients: int | None = None,
    rate: float | None = None,
    dollars_per_hour: float | None = None,
) -> Load:
    """The figures of guidellm's report of one load, with what was asked for."""
    (benchmark,) = report["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    tokens_per_s = _mean(metrics["output_tokens_per_second"])
    starts = sorted(
        request["request_start_time"]
        for requests in _requests(report).values()
        for request in requests
        if request["request_start_time"] is not None
    )
    return Load(
        clients=clients,
        offered_per_s=rate,
        sent_per_s=(len(starts) - 1) / (starts[-1] - starts[0]) if rate and len(starts) > 1 else None,
        answered=totals["successful"],
        failed=totals["errored"],
        unfinished=totals["incomplete"],
        answered_per_s=_mean(metrics["requests_per_second"]),
        tokens_per_s=tokens_per_s,
        **{key: _percentiles(metrics[name], factor) for key, (name, factor) in _METRICS.items()},
        dollars_per_1k_tokens=dollars_per_1k_tokens(dollars_per_hour, tokens_per_s),
    )


def span(report: Mapping[str, Any]) -> tuple[float, float]:
    """Start and end of the load whose rates are reported, in seconds since the epoch."""
    (benchmark,) = report["benchmarks"]
    return benchmark["start_time"], benchmark["end_time"]


def lateness(report: Mapping[str, Any]) -> float:
    """Median delay in seconds of sending the requests; if it is large, they came in a burst."""
    late = [
        request["request_start_time"] - request["info"]["timings"]["targeted_start"]
        for requests in _requests(report).values()
        for request in requests
        if request["request_start_time"] is not None
    ]
    return statistics.median(late) if late else 0.0


def dollars_per_1k_tokens(dollars_per_hour: float | None, tokens_per_s: float) -> float | None:
    """What 1,000 generated tokens cost on a machine paid by the hour; None if its price is unknown."""
    if dollars_per_hour is None or not tokens_per_s:
        return None
    return dollars_per_hour / 3600 / tokens_per_s * 1000


def latencies(report: Mapping[str, Any], metric: str) -> list[float]:
    """ "ttft_ms" or "itl_ms" of every request sent; infinite where it has none."""
    name, factor = _METRICS[metric]
    requests = _requests(report)
    begun = [one[name] for one in requests["successful"] + requests["incomplete"]]
    came = [value * factor for value in begun if value is not None]
    return came + [math.inf] * (len(begun) - len(came) + len(requests["errored"]))


def guidellm_percentiles(report: Mapping[str, Any]) -> dict[str, Any]:
    """All percentiles in guidellm's own names and units, of the requests that were answered."""
    (benchmark,) = report["benchmarks"]
    return {
        name: benchmark["metrics"][name]["successful"]["percentiles"]
        for name, _ in _METRICS.values()
        if _percentiles(benchmark["metrics"][name], 1)
    }


def _requests(report: Mapping[str, Any]) -> Mapping[str, list[dict[str, Any]]]:
    (benchmark,) = report["benchmarks"]
    return {status: requests or [] for status, requests in benchmark["requests"].items() if status != "total"}


def _mean(metric: Mapping[str, Any]) -> float:
    return metric["successful"]["mean"] if metric["successful"] else 0.0


def _percentiles(metric: Mapping[str, Any], factor: float) -> dict[str, float]:
    summary = metric["successful"]
    return {name: summary["percentiles"][name] * factor for name in PERCENTILES} if summary and summary["count"] else {}
