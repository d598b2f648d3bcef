"""Measures the engine alone: prefill and decode by batch and context, against the machine's limits and against peers.

    python -m benchmarks.offline --checkpoint build/converted_checkpoints --peer transformers,llama_cpp,vllm
    python -m benchmarks.offline --shape 7b
    torchrun --nproc_per_node 2 -m benchmarks.offline --shape 7b

The ceilings come first: a large copy, a large read, a large product. Limits follow from them (see limits.py).
Prompts are random ids, all different; replies are greedy and ignore every end of text. A peer gets the same
prompts and the same number of tokens, takes turns with ours, and sleeps while ours runs.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.ceilings import Ceilings, ReadRate, measure_ceilings
from benchmarks.engines import Cell, MeasuredEngine, fit_memory, random_engine, read_sizes
from benchmarks.limits import Rates, Sizes
from benchmarks.offline_report import measured_row, peer_row, plot, print_tables
from benchmarks.peers.export import Source, write_gguf, write_hf
from benchmarks.peers.protocol import Done, Peer, PeerError, Setup, Work
from benchmarks.peers.registry import GPT_FAST, PeerKind, find_peers
from benchmarks.results import RESULTS, ROOT, save
from benchmarks.shapes import find_shape
from llama2.config import EngineConfig, ModelArgs
from llama2.dtypes import read_dtype
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.flags import check_counts, describe_options, given, run, several
from llama2.parallel.process_group import choose_device, init_process_group
from llama2.progress import progress

CACHE = ROOT / "build" / "peers"
ENGINE = EngineConfig()


@describe_options(EngineConfig)
def benchmark(
    *,
    checkpoint: str | None = None,
    shape: str | None = None,
    batches: int | Sequence[int] = (1, 8, 32, 64),
    contexts: int | Sequence[int] = (128, 1024, 4096),
    new_tokens: int = 32,
    rounds: int = 5,
    peer: str | Sequence[str] = (),
    dtype: str = "bf16",
    device: str | None = None,
    threads: int | None = None,
    max_step_tokens: int | None = None,
    max_seq_len: int | None = None,
    activation_dtype: str = ENGINE.activation_dtype,
    kv_cache_dtype: str = ENGINE.kv_cache_dtype,
    cuda_graphs: bool = ENGINE.cuda_graphs,
    symm_mem_all_reduce: bool = ENGINE.symm_mem_all_reduce,
    gguf: str | None = None,
    gpt_fast: str | None = None,
    name: str | None = None,
    out: str | None = None,
    seed: int = 0,
) -> None:
    """Measure a checkpoint or a shape, print tables, and write a JSON file and a plot beside it.

    Args:
        checkpoint: a converted folder; or else
        shape: 7b, 13b, 70b, 1b, 135m, 160m or tiny, with random weights: speed does not depend on them.
        batches: sequences at once, such as 1,8,32,64.
        contexts: tokens of each prompt, such as 128,1024,4096.
        new_tokens: decoding steps that are timed, once every sequence decodes.
        rounds: how often each piece of work is measured.
        peer: engines to measure in turns with ours: transformers (a plain greedy loop), transformers_batching (its own
            continuous batching), transformers_static (static cache, compiled), llama_cpp, vllm, gpt_fast; several with
            commas. One that is not installed is named with the command that installs it.
        dtype: bfloat16 (bf16), float16 (fp16) or float32 (fp32); of weights, KV cache, and the product of the ceilings.
        device: cpu or cuda; by default a GPU where each rank has one.
        threads: of each rank on a CPU, by default OMP_NUM_THREADS, else all cores; a peer gets those of all ranks.
        max_step_tokens: of one forward pass; by default the engine's own, or more where the largest batch needs it.
        max_seq_len: positions that a sequence may take; by default as many as the longest work needs.
        gguf: the GGUF file that the checkpoint was converted from, for llama.cpp: without it, the weights are written
            to one in `dtype`, also if the checkpoint has them quantized.
        gpt_fast: the clone of gpt-fast's repository; by default .venv-peers/gpt-fast.
        name: what the model is called in tables and file names; by default its shape, or its folder's name.
        out: the JSON file; by default build/results/offline-DEVICE-NAME.json. The plot is the same, but .png.
        seed: of the prompts.
    """
    if (checkpoint is None) == (shape is None):
        raise ValueError("give either --checkpoint DIR or --shape NAME")
    if gguf is not None and not (checkpoint and Path(gguf).is_file()):
        raise ValueError(f"gguf must be the file that --checkpoint was converted from, got {gguf}")
    dtype = read_dtype(dtype) or "bfloat16"
    torch_dtype = getattr(torch, dtype)
    check_counts(new_tokens=new_tokens, rounds=rounds, batches=several(batches), contexts=several(contexts))
    check_counts(**given(threads=threads, max_step_tokens=max_step_tokens, max_seq_len=max_seq_len))
    check_counts(least=0, seed=seed)
    largest = max(several(batches))
    max_step_tokens = max_step_tokens or max(ENGINE.max_step_tokens, 2 * largest)
    if max_step_tokens <= largest:
        raise ValueError(f"max_step_tokens must be more than the largest batch, {largest}, got {max_step_tokens}")
    if threads is not None:
        torch.set_num_threads(threads)
    where = choose_device(device)
    peers = find_peers([str(one) for one in several(peer)], device_type=where.type)
    args = find_shape(shape) if shape else ModelArgs.load(str(checkpoint))
    cells = [Cell(batch=batch, context=context) for context in several(contexts) for batch in several(batches)]

    init_process_group(where)
    clone = Path(gpt_fast or GPT_FAST).resolve()
    missing = {one: kind for one, kind in peers.items() if not kind.is_installed(clone)}
    for one, kind in missing.items() if dist.get_rank() == 0 else ():
        print(f"== {one} is left out: {_not_installed(kind)}", file=sys.stderr, flush=True)
    ceilings = measure_ceilings(where, torch_dtype)
    if where.type == "cuda":
        torch.cuda.empty_cache()
    config = EngineConfig(
        max_seq_len=max_seq_len or max(cell.length(new_tokens, max_step_tokens) for cell in cells),
        max_batch_size=largest,
        max_step_tokens=max_step_tokens,
        activation_dtype=activation_dtype,
        kv_cache_dtype=kv_cache_dtype,
        prefix_cache=False,  # a run sees its prompts twice, and computes them twice
        cuda_graphs=cuda_graphs,
        symm_mem_all_reduce=symm_mem_all_reduce,
        seed=0,
    )
    config = fit_memory(args, config, memory_share=0.45 if peers else 0.9, dtype=torch_dtype, device=where)
    started = time.perf_counter()
    if shape:
        engine = random_engine(args, config, dtype=torch_dtype, device=where)
        source = Source.of_shape(shape, args)
    else:
        engine = load_engine(str(checkpoint), dtype=torch_dtype, device=where, config=config)
        source = Source.of_checkpoint(Path(str(checkpoint)))
    ready_seconds = time.perf_counter() - started
    if engine.rank != 0:
        engine.close()
        return
    run = _Run(
        args=args,
        engine=engine,
        ceilings=ceilings,
        new_tokens=new_tokens,
        rounds=rounds,
        dtype=torch_dtype,
        device=where,
        seed=seed,
        source=source,
        sizes=read_sizes(args, config, torch_dtype, weight_bytes=source.read_bytes),
        gguf=gguf,
        gpt_fast=clone,
    )
    figures = {"ready_seconds": ready_seconds, **run.measure(cells, peers, missing)}
    engine.close()

    name = name or shape or Path(str(checkpoint)).resolve().name
    ranks, cores = dist.get_world_size(), torch.get_num_threads()
    path = Path(out) if out else RESULTS / f"offline-{where.type}-{name}.json"
    settings = {
        "model": name,
        "model_args": dataclasses.asdict(args),
        "random_weights": shape is not None,
        "device": where.type,
        "device_name": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
        "dtype": dtype,
        "formats": source.formats,
        "ranks": ranks,
        "threads_per_rank": cores,
        "batches": several(batches),
        "contexts": several(contexts),
        "new_tokens": new_tokens,
        "rounds": rounds,
        "peers": list(peers),
        "engine": dataclasses.asdict(config),
        "seed": seed,
    }
    title = f"{name} in {dtype} on {where.type}, {ranks} rank(s)" + (
        f" of {cores} thread(s)" if where.type == "cpu" else ""
    )
    print_tables(title, figures)
    save(path, "offline", settings, figures)
    print(f"wrote {path}")
    try:
        print(f"wrote {plot(path.with_suffix('.png'), title, figures)}")
    except ImportError as error:
        print(f"no plot is drawn: {error}")


class _OurRounds:
    """Our engine's work, each piece with the hardware's rates at its time.

    One process on a CPU reads its memory anew. Ranks that follow the engine cannot, and a GPU's rates stay as they are.
    """

    def __init__(self, engine: Engine, rates: Rates, device: torch.device) -> None:
        self._engine = MeasuredEngine(engine)
        self._rates = rates
        self._read_rate = ReadRate() if device.type == "cpu" and dist.get_world_size() == 1 else None

    def run(self, work: Work) -> tuple[Done, Rates]:
        rates = self._rates
        if self._read_rate is not None:
            rates = dataclasses.replace(rates, bytes_per_second=self._read_rate())
        return self._engine.run(work), rates


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What all measurements of a run share. On rank 0 only."""

    args: ModelArgs
    engine: Engine
    ceilings: Ceilings
    new_tokens: int
    rounds: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    source: Source
    sizes: Sizes
    gguf: str | None
    gpt_fast: Path

    def measure(
        self, cells: list[Cell], peers: Mapping[str, PeerKind], missing: Mapping[str, PeerKind]
    ) -> dict[str, Any]:
        """Every cell, ours and that of each peer not `missing`, as JSON: `ceilings`, `rows` and `peers`."""
        mine = _OurRounds(self.engine, self.ceilings.rates, self.device)
        reasons = {cell: reason for cell in cells if (reason := cell.reason_to_skip(self.engine, self.new_tokens))}
        measured: dict[Cell, list[tuple[Done, Rates]]] = {cell: [] for cell in cells if cell not in reasons}
        answers: dict[str, dict[str, Any]] = {}
        for name, kind in peers.items() if measured else ():
            if name in missing:
                answers[name] = {"not_run": _not_installed(kind), "install": kind.install}
                continue
            try:
                with self._start(name, kind, list(measured)) as theirs:
                    rows = self._in_turns(name, mine, theirs, measured)
                    answers[name] = {"version": theirs.version, "rows": rows}
            except PeerError as error:
                answers[name] = {"not_run": f"failed: {error}"}
        for cell, rounds in progress([*measured.items()], desc="ours", unit="cell", disable=None):
            while len(rounds) < self.rounds:
                rounds.append(mine.run(self._work(cell, len(rounds))))
        return {
            "ceilings": dataclasses.asdict(self.ceilings),
            "rows": [self._row(cell, measured.get(cell, []), reasons.get(cell)) for cell in cells],
            "peers": answers,
        }

    def _in_turns(
        self, name: str, mine: _OurRounds, theirs: Peer, measured: dict[Cell, list[tuple[Done, Rates]]]
    ) -> list[dict[str, Any]]:
        rows = []
        for cell, rounds in progress([*measured.items()], desc=f"ours and {name}", unit="cell", disable=None):
            where = {"batch": cell.batch, "context": cell.context}
            pairs = []
            try:
                for index in range(self.rounds):
                    work = self._work(cell, index)
                    rounds.append(mine.run(work))
                    pairs.append((rounds[-1][0], theirs.run(work)))
                known = self.source.read is not None
                rows.append(peer_row(**where, new_tokens=self.new_tokens, pairs=pairs, same_weights=known))
            except PeerError as error:
                rows.append({**where, "skipped": str(error)})
        return rows

    def _row(self, cell: Cell, rounds: list[tuple[Done, Rates]], reason: str | None) -> dict[str, Any]:
        if reason:
            return {"batch": cell.batch, "context": cell.context, "skipped": reason}
        return measured_row(
            self.args,
            batch=cell.batch,
            context=cell.context,
            new_tokens=self.new_tokens,
            sizes=self.sizes,
            rounds=rounds,
        )

    def _work(self, cell: Cell, index: int) -> Work:
        return cell.work(index, vocab_size=self.args.vocab_size, new_tokens=self.new_tokens, seed=self.seed)

    def _start(self, name: str, kind: PeerKind, cells: list[Cell]) -> Peer:
        export: dict[str, Callable[[], object]] = {
            "hf": lambda: write_hf(self.source, CACHE, self.dtype),
            "gguf": lambda: self.gguf or write_gguf(self.source, CACHE, self.dtype),
            "none": lambda: "",
        }
        setup = Setup(
            weights=str(export[kind.weights]()),
            device=self.device.type,
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads() * dist.get_world_size(),
            max_batch=max(cell.batch for cell in cells),
            max_length=max(cell.length(self.new_tokens, self.engine.config.max_step_tokens) for cell in cells),
            options={
                **kind.options,
                "random_weights": self.source.read is None,
                "kv_bytes_per_token": read_sizes(self.args, ENGINE, self.dtype).kv_per_token,
                "memory_fraction": 0.45,
                "model_args": dataclasses.asdict(self.args),
                "clone": str(self.gpt_fast),
            },
        )
        return Peer(kind.python, f"benchmarks.peers.{kind.module}", setup, log=CACHE / f"{name}.log")


def _not_installed(kind: PeerKind) -> str:
    return f"not installed: {kind.install}"


if __name__ == "__main__":
    run(benchmark)
    if dist.is_initialized():
        dist.destroy_process_group()
