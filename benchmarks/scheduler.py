"""Measures what a step costs before any model runs: the scheduler's own time, by running and waiting sequences.

    python -m benchmarks.scheduler [--running 1,64,512] [--waiting 0,10000] [--context 1024] [--steps 200]

No torch and no model: sequences of `context` tokens decode made-up tokens. `schedule` makes the plan, `update` records
its results; with more ranks rank 0 also does `pickle`, and each other rank `unpickle`. `add` and `abort` are for one
more request at the end of the queue. Medians, in microseconds.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.results import RESULTS, save
from benchmarks.tables import table
from llama2.config import EngineConfig
from llama2.engine.block_manager import BlockManager
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.scheduler import Plan, Scheduler
from llama2.engine.sequence import Request, Sequence
from llama2.flags import check_counts, run, several

BLOCK_SIZE = 16
WARM_UP = 2 * BLOCK_SIZE  # steps


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Medians in microseconds, by requests running and waiting; `plan_bytes` is the size of the pickled plan."""

    running: int
    waiting: int
    schedule: float
    update: float
    step: float
    step_per_running: float
    pickle: float
    unpickle: float
    plan_bytes: int
    add: float
    abort: float


def measure(*, running: int, waiting: int, context: int, steps: int) -> StepTimes:
    """The times of `steps` decoding steps of `running` sequences, which start with `context` tokens."""
    scheduler, sequences = _decoding(running, waiting, context, steps)
    arrivals = itertools.count(running + waiting)
    times: dict[str, list[float]] = {name: [] for name in ("schedule", "update", "pickle", "unpickle", "add", "abort")}
    plan_bytes = 0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            for values in times.values():
                values.clear()
        arrival = next(arrivals)
        newcomer = _sequence(arrival, 8)
        _timed(times["add"], scheduler.add, newcomer)
        plan = _timed(times["schedule"], scheduler.schedule)
        assert len(plan.chunks) == running, "a measured step decodes, and does nothing else"
        _timed(times["update"], _book, scheduler, plan, sequences, step)
        payload = _timed(times["pickle"], pickle.dumps, plan)
        _timed(times["unpickle"], pickle.loads, payload)
        plan_bytes = len(payload)
        _timed(times["abort"], scheduler.abort, newcomer.request.request_id)
    assert all(sequence.num_generated >= steps for sequence in sequences), "all of them were decoded in every step"
    step_times = [sum(both) for both in zip(times["schedule"], times["update"], strict=True)]
    medians = {name: round(statistics.median(values), 2) for name, values in times.items()}
    step_time = statistics.median(step_times)
    return StepTimes(
        running=running,
        waiting=waiting,
        step=round(step_time, 2),
        step_per_running=round(step_time / running, 3),
        plan_bytes=plan_bytes,
        **medians,
    )


def benchmark(
    *,
    running: int | tuple[int, ...] = (1, 64, 512),
    waiting: int | tuple[int, ...] = (0, 10_000),
    context: int = 1024,
    steps: int = 200,
    out: str = str(RESULTS / "scheduler.json"),
) -> None:
    """Measure every pair of `running` and `waiting`, and print a row for each. Under torchrun only rank 0 runs it, as
    only rank 0 schedules.

    Args:
        running: how many sequences decode together.
        waiting: how many more wait for a place.
        context: tokens of each running sequence.
        steps: how many steps are measured, after a few that are not.
        out: the JSON file to write.
    """
    check_counts(running=several(running), context=context, steps=steps)
    check_counts(least=0, waiting=several(waiting))
    if os.environ.get("RANK", "0") != "0":
        return
    rows = [
        measure(running=one, waiting=other, context=context, steps=steps)
        for one in several(running)
        for other in several(waiting)
    ]
    print(table(list(asdict(rows[0])), [[str(value) for value in asdict(row).values()] for row in rows]))
    settings = {"context": context, "steps": steps, "block_size": BLOCK_SIZE}
    print(f"\nwritten to {save(out, 'scheduler', settings, [asdict(row) for row in rows])}")


def _decoding(running: int, waiting: int, context: int, steps: int) -> tuple[Scheduler, list[Sequence]]:
    """A scheduler at the point where `running` sequences have computed their prompts, and the running ones."""
    longest = context + WARM_UP + steps + 1
    config = EngineConfig(
        max_seq_len=longest, max_batch_size=running, block_size=BLOCK_SIZE, max_step_tokens=running * context
    )
    scheduler = Scheduler(config, BlockManager(running * math.ceil(longest / BLOCK_SIZE), BLOCK_SIZE))
    sequences = [_sequence(arrival, context) for arrival in range(running)]
    for sequence in sequences:
        scheduler.add(sequence)
    plan = scheduler.schedule()
    assert plan is not None
    _book(scheduler, plan, sequences, 0)
    for arrival in range(running, running + waiting):
        scheduler.add(_sequence(arrival, 8))
    return scheduler, sequences


def _book(scheduler: Scheduler, plan: Plan, sequences: list[Sequence], token_id: int) -> None:
    """Each sequence gains a token, which is read at once."""
    scheduler.advance(plan, sequences)
    scheduler.update((sequence, token_id) for sequence in sequences)


def _sequence(arrival: int, length: int) -> Sequence:
    """A new sequence. No two begin alike, so none reuses another's blocks."""
    prompt_ids = (arrival, *range(1, length))
    params = SamplingParams(max_new_tokens=None, temperature=0)
    return Sequence.of(Request(request_id=f"request-{arrival}", prompt_ids=prompt_ids, params=params), arrival)


def _timed(times: list[float], function: Callable[..., Any], *args: Any) -> Any:
    """What `function` returns; the microseconds that it took are added to `times`."""
    start = time.perf_counter()
    result = function(*args)
    times.append((time.perf_counter() - start) * 1e6)
    return result


if __name__ == "__main__":
    run(benchmark)
