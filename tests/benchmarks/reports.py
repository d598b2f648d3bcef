"""Reports of one load, in guidellm 0.8.1's shape as far as it is read."""

from __future__ import annotations

from typing import Any


def report(
    *,
    ttft_ms: list[float],
    itl_ms: list[float],
    failed: int = 0,
    unfinished: tuple[float | None, ...] | list[float | None] = (),
    output_tokens: int = 8,
    spacing: float = 0.5,
    late: float = 0.0,
) -> dict[str, Any]:
    """Requests that begin `spacing` seconds apart, each `late` seconds after it should. Each that was answered has both
    latencies; each that was cut off has its time to first token, or None if it had none."""
    answered = [
        _request(index, first, between, (first + between * (output_tokens - 1)) / 1000, spacing, late)
        for index, (first, between) in enumerate(zip(ttft_ms, itl_ms, strict=True))
    ]
    cut = [_request(len(answered) + index, first, None, None, spacing, late) for index, first in enumerate(unfinished)]
    broken = [_request(len(answered) + len(cut) + index, None, None, None, spacing, late) for index in range(failed)]
    duration = max((one["request_start_time"] + one["request_latency"] for one in answered), default=1.0)
    metrics: dict[str, Any] = {
        name: {"successful": _summary([one[name] for one in answered])}
        for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")
    }
    metrics |= {
        "request_totals": {
            "successful": len(answered), "errored": failed, "incomplete": len(cut),
            "total": len(answered) + failed + len(cut),
        },
        "requests_per_second": {"successful": {"mean": len(answered) / duration}},
        "output_tokens_per_second": {"successful": {"mean": len(answered) * output_tokens / duration}},
    }  # fmt: skip
    # guidellm writes null for an empty list.
    requests = {"successful": answered or None, "errored": broken or None, "incomplete": cut or None, "total": None}
    return {"benchmarks": [{"metrics": metrics, "requests": requests}]}


def _request(
    index: int, ttft: float | None, itl: float | None, latency: float | None, spacing: float, late: float
) -> dict[str, Any]:
    return {
        "request_start_time": index * spacing,
        "info": {"timings": {"targeted_start": index * spacing - late}},
        "time_to_first_token_ms": ttft,
        "inter_token_latency_ms": itl,
        "request_latency": latency,
    }


def _summary(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values) or [0.0]
    points = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    percentiles = {name: ordered[min(int(share * len(ordered)), len(ordered) - 1)] for name, share in points.items()}
    return {"count": len(values), "mean": sum(values) / max(1, len(values)), "percentiles": percentiles}
