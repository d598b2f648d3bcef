"""Measures the whole server: loads made by guidellm, through TorchServe, to the tokens that a client sees.

    python -m benchmarks.online [--concurrency 1,8,32] [--rates 1,2,4] [--slo ttft=500,itl=50] [--front_cost]
        [--tp 2] [--batch_size 32] [--dollars_per_hour 3.81]

It serves `--checkpoint` itself and always stops that server, or loads the one at `--url` with `--key`. A row of the
table is one load: a number of clients, or of requests per second with Poisson arrivals. Offered and answered rates are
reported separately. Latencies are of the requests that were answered; the inter-token latency of one is the mean over
its tokens.

`--slo` searches for the highest rate at which 90 % of what is sent meets it. `--front_cost` compares with the engine
alone, on the same ranks and with the same work, before and after: tokens/s at 32 clients, time to first token of one.
It also shows what kept the processors busy: on one machine the load and the front end take them from the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import front
from benchmarks.cpu_shares import CpuWatch
from benchmarks.load import (
    GUIDELLM,
    PERCENTILES,
    Load,
    LoadError,
    Target,
    Work,
    check_installed,
    guidellm_percentiles,
    lateness,
    offer,
    read_report,
    span,
)
from benchmarks.plots import Line, Panel, draw
from benchmarks.results import RESULTS, ROOT, save
from benchmarks.slo import Slo, highest_rate
from benchmarks.tables import table
from handler.torchserve.server.process import ServerError
from llama2.config import EngineConfig
from llama2.flags import check_amounts, check_counts, describe_options, given, run, several
from scripts.serve import local_settings
from scripts.temporary_server import MODEL, temporary_server

READY_SECONDS = 1200
LATE_SECONDS = 1.0
TRIES = 3
ENGINE = EngineConfig()
_OWN_SERVER = ("tp", "batch_size", "max_seq_len", "max_step_tokens")


class Bench:
    """The loads on one server, each with its own prompts, and their results."""

    def __init__(self, target: Target, work: Work, *, guidellm: Path, dollars_per_hour: float | None) -> None:
        self._target = target
        self._work = work
        self._guidellm = guidellm
        self._dollars_per_hour = dollars_per_hour
        self._seeds = itertools.count(1)
        self.rows: list[dict[str, Any]] = []

    def load(self, *, clients: int | None = None, rate: float | None = None) -> Load:
        """Run one load and keep its figures."""
        return self._keep(self.offer(clients=clients, rate=rate), clients=clients, rate=rate)

    def meets(self, slo: Slo, rate: float) -> bool:
        """Run a load of this rate for its full time, so that what cannot be answered piles up; keep its figures, and
        return whether it was within the limits."""
        report = self.offer(rate=rate, requests=math.ceil(2 * rate * self._work.seconds))
        self._keep(report, rate=rate)
        return slo.is_met_by(report)

    def offer(self, *, clients: int | None = None, rate: float | None = None, **changes: int) -> dict[str, Any]:
        """Run a load without keeping it, with `changes` to its work; returns guidellm's report.

        Raises:
            LoadError: the load failed, or was sent late, and so in a burst, on every try.
        """
        work = dataclasses.replace(self._work, **changes)
        for _ in range(TRIES):
            _say(f"{clients} clients" if rate is None else f"{rate:g} requests/s")
            report = offer(
                self._target, work, clients=clients, rate=rate, seed=next(self._seeds), guidellm=self._guidellm
            )
            late = 0.0 if rate is None else lateness(report)
            if late <= LATE_SECONDS:
                return report
            _say(f"the load generator was {late:.1f} s late: again")
        raise LoadError(f"the load generator was late {TRIES} times: something else keeps the machine busy")

    def _keep(self, report: Any, *, clients: int | None = None, rate: float | None = None) -> Load:
        load = read_report(report, clients=clients, rate=rate, dollars_per_hour=self._dollars_per_hour)
        self.rows.append({**dataclasses.asdict(load), "guidellm": guidellm_percentiles(report)})
        return load


@describe_options(EngineConfig)
def benchmark(
    *,
    url: str | None = None,
    key: str | None = None,
    checkpoint: str = str(ROOT / "build" / "converted_checkpoints"),
    tp: int | None = None,
    batch_size: int = 32,
    max_seq_len: int = 2048,
    max_step_tokens: int = ENGINE.max_step_tokens,
    concurrency: int | Sequence[int] = (1, 8, 32),
    rates: float | Sequence[float] = (),
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    requests: int = 128,
    seconds: float = 60,
    slo: str | None = None,
    slo_rounds: int = 7,
    front_cost: bool = False,
    dollars_per_hour: float | None = None,
    guidellm: str = str(GUIDELLM),
    out: str = str(RESULTS / "online.json"),
) -> None:
    """Load a server, print a row for each load, and write a JSON file and a plot.

    Args:
        url: of a running server, such as http://127.0.0.1:8080/predictions/llama/1.0; by default one is started.
        key: its inference key.
        checkpoint: what to serve; also the tokenizer that tokens are counted with.
        tp: ranks of the server that is started; by default as in `make serve`.
        batch_size: sequences that it computes together; it accepts twice as many at once.
        concurrency: loads of this many clients, each of which sends its next request once it has its reply.
        rates: loads of this many requests per second, Poisson arrivals.
        prompt_tokens: of each request.
        output_tokens: of each request.
        max_seq_len: prompt and reply together, in tokens.
        requests: of each load, at most; a load of the search for the highest rate ends by time alone.
        seconds: how long each load runs, at most.
        slo: the limits, in ms, of a search for the highest rate: ttft=500,itl=50, or one of them.
        slo_rounds: loads that the search may make.
        front_cost: compare with the engine alone; the server must be started here.
        dollars_per_hour: what the machine costs.
        guidellm: the program that makes the loads.
        out: the JSON file to write; the plot goes beside it as .png.
    """
    settings = {name: value for name, value in locals().items() if name not in ("url", "key", "guidellm", "out")}
    check_counts(
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        max_step_tokens=max_step_tokens,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        requests=requests,
        slo_rounds=slo_rounds,
    )
    check_counts(**given(tp=tp, concurrency=several(concurrency)))
    check_amounts(seconds=seconds, **given(rates=several(rates), dollars_per_hour=dollars_per_hour))
    limits = Slo.parse(slo) if slo is not None else None
    if front_cost and url is not None:
        raise ValueError("front_cost needs a server that is started here: the engine alone must have the same settings")
    if (url is None) != (key is None):
        raise ValueError("url and key belong together")
    check_installed(Path(guidellm))
    server = local_settings(tp)
    server["batchSize"] = 2 * batch_size
    server["handler"] |= {
        "max_batch_size": batch_size, "max_seq_len": max_seq_len, "max_step_tokens": max_step_tokens
    }  # fmt: skip
    settings |= {"checkpoint": Path(checkpoint).name, "tp": server["handler"]["tensor_parallel_size"]}
    if url is not None:  # unknown for a server not started here
        settings = {name: value for name, value in settings.items() if name not in _OWN_SERVER}
    work = Work(prompt_tokens=prompt_tokens, output_tokens=output_tokens, requests=requests, seconds=seconds)
    figures: dict[str, Any] = {}
    alone = [_engine_alone(checkpoint, server, work)] if front_cost else []
    with contextlib.ExitStack() as stack:
        if url is None or key is None:
            _say("start TorchServe")
            running = stack.enter_context(temporary_server(Path(checkpoint), server, timeout=READY_SECONDS))
            url, key = f"http://127.0.0.1:{running.ports.inference}/predictions/{MODEL}/1.0", running.key("inference")
        target = Target(url=url, key=key, model=MODEL, tokenizer=Path(checkpoint))
        bench = Bench(target, work, guidellm=Path(guidellm), dollars_per_hour=dollars_per_hour)
        clients = several(concurrency)
        warmest = max(clients, default=8)
        bench.offer(clients=warmest, requests=warmest)  # warms up
        loads = [bench.load(clients=one) for one in clients] + [bench.load(rate=one) for one in several(rates)]
        if limits is not None:
            first = max((load.answered_per_s for load in loads), default=0.0) / 2 or 1.0
            found = highest_rate(lambda rate: bench.meets(limits, rate), first=first, rounds=slo_rounds)
            figures["slo"] = {**dataclasses.asdict(limits), "highest_rate_per_s": found}
        if front_cost:
            with CpuWatch(running.processes()) as watch:
                many = bench.offer(clients=front.CLIENTS)
            one = read_report(bench.offer(clients=1, requests=front.ALONE, output_tokens=2), clients=1)
    if front_cost:
        alone.append(_engine_alone(checkpoint, server, work))
        cores = watch.cores(*span(many))
        figures["front"] = front.front_cost(alone, read_report(many, clients=front.CLIENTS), one, cores)
    figures["loads"] = bench.rows
    print(as_text(figures))
    path = save(out, "online", settings, figures)
    print(f"\nwritten to {path} and {plot(bench.rows, path.with_suffix('.png'))}")


def as_text(figures: Mapping[str, Any]) -> str:
    """The table of the loads, and a sentence for each other figure."""
    latencies = [f"{name} {percentile}" for name in ("ttft", "itl", "total") for percentile in PERCENTILES]
    header = ["offered", "answered/s", "tokens/s", *latencies, "failed", "cut off", "$/1K tokens"]
    parts = [table(header, [_cells(row) for row in figures["loads"]]), "(latencies in ms)"]
    if slo := figures.get("slo"):
        limits = " and ".join(f"{name[:-3]} <= {slo[name]:g} ms" for name in ("ttft_ms", "itl_ms") if slo[name])
        parts.append(f"p90 of {limits}: up to {slo['highest_rate_per_s']:.2f} requests/s")
    if cost := figures.get("front"):
        added = "-" if cost["added_ttft_ms"] is None else f"{cost['added_ttft_ms']:.1f}"
        parts.append(
            f"the front: {cost['ratio_to_engine']:.3f} of the engine's tokens/s at {cost['load']['clients']} clients "
            f"(our target: at least {front.WANTED_RATIO}), {added} ms to the first token of one "
            f"(our target: at most {front.WANTED_MS})"
        )
        cores = ", ".join(f"{part} {busy:.2f}" for part, busy in cost["cores"].items())
        parts.append(f"processors busy meanwhile: {cores}; together {sum(cost['cores'].values()):.2f}")
    return "\n".join(parts)


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw the latencies over the answered rate, and the answered rate over the offered one."""
    kinds = {
        "clients": [row for row in rows if row["clients"]],
        "by chance": [row for row in rows if not row["clients"]],
    }
    panels = [
        Panel(
            title=title,
            x="answered requests/s",
            y="ms",
            lines=[
                _line(f"{kind}, {percentile}", [(row["answered_per_s"], row[metric][percentile]) for row in answered],
                      color=color, dashed=percentile != "p50")
                for color, (kind, answered) in enumerate(
                    (kind, [row for row in some if row[metric]]) for kind, some in kinds.items()
                )
                for percentile in ("p50", "p90")
                if answered
            ],
        )
        for metric, title in (("ttft_ms", "time to first token"), ("itl_ms", "inter-token latency"))
    ]  # fmt: skip
    if chance := kinds["by chance"]:
        offered = [row["offered_per_s"] for row in chance]
        answered = _line("answered", [(row["offered_per_s"], row["answered_per_s"]) for row in chance])
        ideal = _line("offered", [(rate, rate) for rate in offered], color=1, dashed=True)
        panels.append(Panel(title="rates", x="offered requests/s", y="requests/s", lines=[answered, ideal]))
    return draw(path, "Through TorchServe", panels)


def _line(label: str, points: Sequence[tuple[float, float]], *, color: int = 0, dashed: bool = False) -> Line:
    ordered = sorted(points)
    return Line(label=label, xs=[x for x, _ in ordered], ys=[y for _, y in ordered], color=color, dashed=dashed)


def _cells(row: Mapping[str, Any]) -> list[str]:
    dollars = row["dollars_per_1k_tokens"]
    return [
        _offered(row),
        f"{row['answered_per_s']:.2f}",
        f"{row['tokens_per_s']:.1f}",
        *(
            f"{row[name][one]:.0f}" if row[name] else "-"
            for name in ("ttft_ms", "itl_ms", "total_ms")
            for one in PERCENTILES
        ),
        str(row["failed"]),
        str(row["unfinished"]),
        "-" if dollars is None else f"{dollars:.5f}",
    ]


def _offered(row: Mapping[str, Any]) -> str:
    return f"{row['clients']} clients" if row["clients"] else f"{row['offered_per_s']:.3g}/s"


def _engine_alone(checkpoint: str, server: Mapping[str, Any], work: Work) -> dict[str, float]:
    _say("the engine alone")
    return front.engine_alone(Path(checkpoint), server, work)


def _say(what: str) -> None:
    print(f"== {what}", file=sys.stderr, flush=True)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like Ctrl-C, it also stops the server
    run(benchmark, mistakes=(LoadError, ServerError, ValueError))


if __name__ == "__main__":
    main()
