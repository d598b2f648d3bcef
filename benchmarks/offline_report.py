"""Owns the report of offline's measurements: figures with limits and ratios, tables on the terminal, and a plot.

Measures nothing, and knows no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import Rates, Sizes, decode_seconds, prefill_seconds
from benchmarks.peers.protocol import Done
from benchmarks.plots import Line, Panel, draw
from benchmarks.tables import table
from llama2.config import ModelArgs


def measured_row(
    args: ModelArgs,
    *,
    batch: int,
    context: int,
    new_tokens: int,
    sizes: Sizes,
    rounds: Sequence[tuple[Done, Rates]],
) -> dict[str, Any]:
    """Rates of one cell, medians over the rounds, with the limits; and every round. Seconds, tokens per second.

    A round comes with the hardware's rates at its time. The decode limit is that of the mean length while decoding,
    `context` + `new_tokens` / 2.
    """
    prefill = statistics.median(done.prefill_seconds for done, _ in rounds)
    decode = statistics.median(done.decode_seconds for done, _ in rounds)
    length = context + new_tokens / 2

    def limit(seconds: Callable[..., float], length: float) -> float:
        return statistics.median(seconds(args, rates, sizes, batch=batch, context=length) for _, rates in rounds)

    prefill_limit, step_limit = limit(prefill_seconds, context), limit(decode_seconds, length)
    return {
        "batch": batch,
        "context": context,
        "prefill_tokens_per_second": batch * context / prefill,
        "prefill_limit_tokens_per_second": batch * context / prefill_limit,
        "prefill_percent_of_limit": 100 * prefill_limit / prefill,
        "ttft_seconds": prefill,
        "decode_tokens_per_second": batch * new_tokens / decode,
        "decode_limit_tokens_per_second": batch / step_limit,
        "decode_percent_of_limit": 100 * step_limit * new_tokens / decode,
        "milliseconds_per_step": 1e3 * decode / new_tokens,
        "rounds": [
            {**_seconds(done), "bytes_per_second": rates.bytes_per_second, "flops_per_second": rates.flops_per_second}
            for done, rates in rounds
        ],
    }


def peer_row(
    *, batch: int, context: int, new_tokens: int, pairs: Sequence[tuple[Done, Done]], same_weights: bool
) -> dict[str, Any]:
    """Ours over a peer's, for one cell of pairs (ours, theirs) that were measured one after the other.

    A ratio above 1 means that we are faster. `same_first_tokens` is the share of replies that begin alike, which shows
    that the two did the same work; None where each has its own random weights.
    """
    theirs = [pair[1] for pair in pairs]
    alike = [
        mine[0] == other[0] for one, two in pairs for mine, other in zip(one.token_ids, two.token_ids, strict=True)
    ]
    return {
        "batch": batch,
        "context": context,
        "prefill_tokens_per_second": batch * context / statistics.median(done.prefill_seconds for done in theirs),
        "decode_tokens_per_second": batch * new_tokens / statistics.median(done.decode_seconds for done in theirs),
        "prefill_ratio": _spread(two.prefill_seconds / one.prefill_seconds for one, two in pairs),
        "decode_ratio": _spread(two.decode_seconds / one.decode_seconds for one, two in pairs),
        "same_first_tokens": statistics.mean(alike) if same_weights else None,
        "rounds": [{"ours": _seconds(one), "theirs": _seconds(two)} for one, two in pairs],
    }


def measured_table(rows: list[dict[str, Any]]) -> str:
    """The measured rows, and the reason for each skipped one."""
    return _table(("prefill tok/s", "limit", "%", "TTFT s", "decode tok/s", "limit", "%", "ms/step"), rows, _cells)


def print_tables(title: str, figures: dict[str, Any]) -> None:
    ceilings = figures["ceilings"]
    print(f"\n{title}")
    print(
        f"ceilings, measured now: copy {ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s, "
        f"read {ceilings['read_bytes_per_second'] / 1e9:.1f} GB/s (the better of the two counts; for one process on a "
        f"CPU a read before each round), "
        f"product {ceilings['flops_per_second'] / 1e12:.2f} TFLOP/s; "
        f"the engine was ready after {figures['ready_seconds']:.1f} s\n"
    )
    print(measured_table(figures["rows"]))
    for name, peer in figures["peers"].items():
        print(f"\n{peer_table(name, peer)}")


def peer_table(name: str, peer: dict[str, Any]) -> str:
    if "rows" not in peer:
        return f"{name}: {peer['not_run']}"
    ratios = ("prefill tok/s", "ours / theirs", "decode tok/s", "ours / theirs", "alike")
    return (
        f"{name} {peer['version']}, and ours / {name}: median (min to max); alike: replies with our first token\n"
        + _table(ratios, peer["rows"], _peer_cells)
    )


def plot(path: Path, title: str, figures: dict[str, Any]) -> Path:
    """Tokens per second by batch, prefill and decode side by side: a line for each context, its limit dashed.

    Peers have their own panel: how many times as fast as each of them we decode.
    """
    rows = _present(figures["rows"])
    contexts = sorted({row["context"] for row in rows})
    panels = []
    for what in ("prefill", "decode"):
        lines = []
        for color, context in enumerate(contexts):
            mine = [row for row in rows if row["context"] == context]
            batches = [float(row["batch"]) for row in mine]
            for dashed, key in ((False, "tokens_per_second"), (True, "limit_tokens_per_second")):
                label = f"limit at {context}" if dashed else f"context {context}"
                ys = [row[f"{what}_{key}"] for row in mine]
                lines.append(Line(label=label, xs=batches, ys=ys, color=color, dashed=dashed))
        # Decoding speeds up most with the batch, a prompt hardly at all.
        panels.append(Panel(title=what, x="batch", y="tokens/s", lines=lines, log_x=True, log_y=what == "decode"))
    lines = []
    for name, peer in figures["peers"].items():
        theirs = _present(peer.get("rows", []))
        for context in sorted({row["context"] for row in theirs}):
            mine = [row for row in theirs if row["context"] == context]
            batches, ratios = [float(row["batch"]) for row in mine], [row["decode_ratio"]["median"] for row in mine]
            lines.append(Line(label=f"{name} at {context}", xs=batches, ys=ratios, color=len(lines)))
    if lines:
        panels.append(Panel(title="decode, ours / theirs", x="batch", y="ratio", lines=lines, log_x=True))
    return draw(path, title, panels)


def _present(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if "skipped" not in row]


def _seconds(done: Done) -> dict[str, float]:
    return {"prefill_seconds": done.prefill_seconds, "decode_seconds": done.decode_seconds}


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"min": ordered[0], "median": statistics.median(ordered), "max": ordered[-1]}


def _table(columns: Sequence[str], rows: list[dict[str, Any]], cells: Callable[[dict[str, Any]], list[str]]) -> str:
    lines = [(str(row["batch"]), str(row["context"]), *cells(row)) for row in _present(rows)]
    reasons = [
        f"batch {row['batch']} at context {row['context']} was skipped: {row['skipped']}"
        for row in rows
        if "skipped" in row
    ]
    return "\n".join((table(("batch", "context", *columns), lines), *reasons))


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['prefill_tokens_per_second']:,.0f}",
        f"{row['prefill_limit_tokens_per_second']:,.0f}",
        f"{row['prefill_percent_of_limit']:.0f}",
        f"{row['ttft_seconds']:.3f}",
        f"{row['decode_tokens_per_second']:,.0f}",
        f"{row['decode_limit_tokens_per_second']:,.0f}",
        f"{row['decode_percent_of_limit']:.0f}",
        f"{row['milliseconds_per_step']:.2f}",
    ]


def _peer_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['prefill_tokens_per_second']:,.0f}",
        _ratio(row["prefill_ratio"]),
        f"{row['decode_tokens_per_second']:,.0f}",
        _ratio(row["decode_ratio"]),
        "-" if row["same_first_tokens"] is None else f"{row['same_first_tokens']:.0%}",
    ]


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
