"""Measures one model on one device, all in one process: prefill and decode by cell, the start, and profiles of a step.

    python -m benchmarks.gpu_run --shape 7b --cells 1x128,64x1024 --profiles 1,8,64

Needs only torch and numpy. The weights are random. Every cell is written to `gpu.json` as soon as it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ceilings import measure_ceilings
from benchmarks.engines import Cell, MeasuredEngine, RandomModel, fit_memory, read_sizes
from benchmarks.gpu_report import GpuReport
from benchmarks.offline_report import measured_row, measured_table
from benchmarks.profiles import profile
from benchmarks.results import RESULTS
from benchmarks.shapes import SHAPES
from llama2.config import EngineConfig
from llama2.dtypes import read_dtype
from llama2.engine.engine import Engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request
from llama2.flags import argument
from llama2.kv_cache import bytes_per_block
from llama2.parallel.process_group import choose_device, init_process_group

# Of the memory that the weights leave free: cells need less, and recording needs some.
KV_SHARE = 0.6
PROFILED_STEPS = 3


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    device = choose_device(settings.device)
    init_process_group(device)
    run = _Run(settings, device)
    run.start()
    run.measure()
    run.profile()
    if device.type == "cuda":
        run.record_again()
    print(f"wrote {settings.out}/gpu.json")


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=(__doc__ or "").split("\n")[0])
    known.add_argument("--shape", choices=SHAPES, default="7b", help="the model's architecture")
    known.add_argument("--cells", type=_cells, default="1x128", help="BATCHxCONTEXT, several with commas")
    known.add_argument("--profiles", type=_counts, default="", help="batches whose decoding is profiled: 1,8,64")
    known.add_argument("--profile_context", type=_count, default=1024, help="tokens of each prompt before that")
    known.add_argument("--profile_prompt", type=_count, default=2048, help="tokens of the prompt that is profiled")
    known.add_argument("--new_tokens", type=_count, default=32, help="decoding steps that are timed")
    known.add_argument("--rounds", type=_count, default=3, help="how often each cell is measured")
    known.add_argument("--max_step_tokens", type=_count, default=2048, help="of one forward pass")
    known.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    known.add_argument("--dtype", type=argument(read_dtype), default="bfloat16")
    known.add_argument("--out", type=Path, default=RESULTS / "gpu", help="the folder of gpu.json")
    return known


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",") if part]


def _cells(text: str) -> list[Cell]:
    cells = []
    for part in text.split(","):
        batch, _, context = part.partition("x")
        cells.append(Cell(batch=_count(batch), context=_count(context)))
    return cells


class _Run:
    """One process's measurements, in the order of its public methods."""

    def __init__(self, settings: argparse.Namespace, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._dtype = getattr(torch, settings.dtype)
        self._args = SHAPES[settings.shape]
        self._report = GpuReport(settings.out)
        self._figures: dict[str, Any] = {"rows": []}
        self._ceilings = measure_ceilings(device, self._dtype)
        self._figures["ceilings"] = dataclasses.asdict(self._ceilings)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        profiled = [Cell(batch=batch, context=settings.profile_context) for batch in settings.profiles]
        if profiled:
            profiled.append(Cell(batch=1, context=settings.profile_prompt))
        wanted = [*settings.cells, *profiled]
        config = EngineConfig(
            max_seq_len=max(cell.length(settings.new_tokens, settings.max_step_tokens) for cell in wanted),
            max_batch_size=max(cell.batch for cell in wanted),
            max_step_tokens=settings.max_step_tokens,
            prefix_cache=False,  # a run sees its prompts twice, and computes them twice
            seed=0,
        )
        self._config = fit_memory(self._args, config, memory_share=KV_SHARE, dtype=self._dtype, device=device)

    def start(self) -> None:
        """Make the model and the engine, which on a GPU records decoding, and record the time and memory taken."""
        started = time.perf_counter()
        self._model = RandomModel(self._args, self._config, dtype=self._dtype, device=self._device)
        self._wait()
        model_seconds = time.perf_counter() - started
        self._engine, memory = self._make_engine(self._config)
        self._figures["start"] = {
            "model_seconds": model_seconds,
            "ready_seconds": time.perf_counter() - started,
            **memory,
        }
        self._write()

    def measure(self) -> None:
        settings, engine = self._settings, MeasuredEngine(self._engine)
        for cell in settings.cells:
            row: dict[str, Any] = {"batch": cell.batch, "context": cell.context}
            reason = cell.reason_to_skip(self._engine, settings.new_tokens)
            if reason:
                self._figures["rows"].append({**row, "skipped": reason})
                continue
            sizes = {"vocab_size": self._args.vocab_size, "new_tokens": settings.new_tokens}
            done = [engine.run(cell.work(index, **sizes)) for index in range(settings.rounds)]
            row = measured_row(
                self._args,
                **row,
                new_tokens=settings.new_tokens,
                sizes=read_sizes(self._args, self._config, self._dtype),
                rounds=[(one, self._ceilings.rates) for one in done],
            )
            self._figures["rows"].append(row)
            self._write()
            print(measured_table([row]), flush=True)

    def profile(self) -> None:
        """Three decoding steps of each batch, and one prompt."""
        settings = self._settings
        if not settings.profiles:
            return
        profiles = self._figures["profiles"] = {}
        with contextlib.suppress(RuntimeError):
            profile(lambda: None, 1, self._device)  # the first one sets up the profiler
        decoding = [Cell(batch=batch, context=settings.profile_context) for batch in settings.profiles]
        work = [("decode", cell, self._profile_decoding) for cell in decoding]
        work.append(("prefill", Cell(batch=1, context=settings.profile_prompt), self._profile_prompt))
        for what, cell, run in work:
            try:
                reason = cell.reason_to_skip(self._engine, settings.new_tokens)
                figures = {"left_out": reason} if reason else run(cell)
            except RuntimeError as error:  # a machine may forbid profiling; the other figures matter more
                figures = {"left_out": str(error).splitlines()[0]}
            profiles[f"{what} {cell.batch}x{cell.context}"] = figures
            self._write()

    def record_again(self) -> None:
        """A second, small engine on the same model: the cost of recording once every kernel is compiled."""
        config = dataclasses.replace(self._config, kv_memory_fraction=0.1, max_seq_len=64)
        _, memory = self._make_engine(config)
        self._figures["start"] |= {f"again_{name}": value for name, value in memory.items()}
        self._write()

    def _make_engine(self, config: EngineConfig) -> tuple[Engine, dict[str, float]]:
        """An engine, the seconds it took, and the memory it took besides its KV cache: on a GPU, that of the graphs."""
        before = self._memory()
        started = time.perf_counter()
        engine = self._model.engine(config)
        self._wait()
        seconds = time.perf_counter() - started
        block = bytes_per_block(
            self._args, block_size=config.block_size, n_kv_heads=self._args.n_kv_heads, dtype=self._dtype
        )
        kv = (engine.stats().total_blocks + 1) * block
        return engine, {
            "engine_seconds": seconds,
            **{f"graph_{name}_bytes": value - before[name] - kv for name, value in self._memory().items()},
        }

    def _memory(self) -> dict[str, int]:
        """Bytes of a GPU that tensors hold, that PyTorch reserves, and that are in use in all."""
        if self._device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self._device)
        return {
            "allocated": torch.cuda.memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "device": total - free,
        }

    def _profile_decoding(self, cell: Cell) -> dict[str, Any]:
        names = self._add(cell, max_new_tokens=None)
        waiting = set(names)
        while waiting:
            waiting -= {output.request_id for output in self._engine.step()}
        for _ in range(2):
            self._engine.step()
        try:
            return profile(self._engine.step, PROFILED_STEPS, self._device)
        finally:
            for name in names:
                self._engine.abort(name)
            self._finish()

    def _profile_prompt(self, cell: Cell) -> dict[str, Any]:
        for _ in range(2):
            self._add(cell, max_new_tokens=1)
            self._finish()

        def compute() -> None:
            self._add(cell, max_new_tokens=1)
            self._finish()

        return profile(compute, 1, self._device)

    def _add(self, cell: Cell, *, max_new_tokens: int | None) -> list[str]:
        params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True)
        work = cell.work(0, vocab_size=self._args.vocab_size, new_tokens=1)
        names = [f"profiled {index}" for index in range(cell.batch)]
        for name, prompt in zip(names, work.prompts, strict=True):
            self._engine.add(Request(request_id=name, prompt_ids=tuple(prompt), params=params))
        return names

    def _finish(self) -> None:
        while self._engine.has_work:
            self._engine.step()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _write(self) -> None:
        settings = {name: value for name, value in vars(self._settings).items() if name != "out"}
        settings["cells"] = [f"{cell.batch}x{cell.context}" for cell in settings["cells"]]
        settings["engine"] = dataclasses.asdict(self._config)
        self._report.put(f"engine {self._settings.shape}", settings, self._figures)


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
