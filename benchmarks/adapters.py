"""Measures what adapters cost: steps in which each sequence has a LoRA adapter, beside the same steps without.

    python -m benchmarks.adapters [--shape 135m] [--rank 8] [--rounds 100] [--threads 1]

The two take turns, step by step, in one process, on random weights and no scheduler. A figure is the median over the
rounds of the ratio of their tokens per second; above 1 would be faster than without. With one thread processor time is
taken, which other programs on the machine change less than the time on the clock. Targets are in `CELLS`.

The last row is of whole requests to whole engines: for 16 adapters of 1,000 that are registered by name, while others
fill host memory, beside the same for 16 that are all there are. Then 16 loads, one after the other, beside decoding
sequences, on the clock.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.engines import RandomModel
from benchmarks.results import RESULTS, save
from benchmarks.shapes import find_shape
from benchmarks.tables import table
from handler.adapters import Adapters
from llama2.adapters.adapter import Adapter, LoraPair
from llama2.adapters.config import ALL_LINEAR, AdapterConfig
from llama2.adapters.format import targets, write_adapter
from llama2.adapters.reference import AdapterRef
from llama2.adapters.store import AdapterStore
from llama2.config import EngineConfig, ModelArgs
from llama2.engine.engine import HELD_ADAPTERS
from llama2.engine.runner import Runner
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.scheduler import Chunk, Plan
from llama2.engine.sequence import Errand, Output, Request
from llama2.flags import check_counts, run
from llama2.kv_cache import KVCache
from llama2.parallel.process_group import init_process_group
from llama2.weights.readers.hf_layout import hf_shapes

SEED = 1
BLOCK_SIZE = 16
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A step of `sequences`, which bring `length` tokens each and are `context` long then."""

    sequences: int
    adapters: int
    modules: tuple[str, ...] | str = ALL_LINEAR
    length: int = 1
    context: int = 128
    wanted: float | None = None

    def plan(self, *, with_adapters: bool) -> Plan:
        width = -(-self.context // BLOCK_SIZE)
        return Plan(
            chunks=tuple(
                Chunk(
                    key=index,
                    start=self.context - self.length,
                    token_ids=(1 + index,) * self.length,
                    block_table=array("i", range(index * width, (index + 1) * width)),
                    logits="last",
                    slot=index % self.adapters if with_adapters else -1,
                )
                for index in range(self.sequences)
            )
        )


ACTIVE, REGISTERED, WANTED_OF_REGISTERED = 16, 1000, 0.95
BESIDE_LOADS = 8
NEW_TOKENS = 32  # and as many of the prompt
NAME_OF_REGISTERED = f"requests for {ACTIVE} adapters of {REGISTERED} registered, beside {ACTIVE} registered"
QUERY_VALUE = ("q_proj", "v_proj")
CELLS = (
    Cell(sequences=1, adapters=1),
    Cell(sequences=8, adapters=8, wanted=0.80),
    Cell(sequences=16, adapters=16, wanted=0.80),
    Cell(sequences=32, adapters=16, wanted=0.85),
    Cell(sequences=8, adapters=8, modules=QUERY_VALUE, wanted=0.90),
    Cell(sequences=16, adapters=16, modules=QUERY_VALUE, wanted=0.90),
    Cell(sequences=32, adapters=16, modules=QUERY_VALUE, wanted=0.90),
    Cell(sequences=1, adapters=1, length=1024, context=1024),
)


def ratios(model: RandomModel, cell: Cell, *, rank: int, max_rank: int, rounds: int, one_thread: bool) -> list[float]:
    """Seconds of a step without adapters, over those of one with, of each round."""
    transformer = model.model
    args, dtype, device = transformer.args, transformer.dtype, transformer.device
    blocks = cell.sequences * -(-cell.context // BLOCK_SIZE)
    cache = KVCache(
        args, num_blocks=blocks, block_size=BLOCK_SIZE, n_kv_heads=args.n_kv_heads, dtype=dtype, device=device
    )
    slots = model.slots(cell.adapters, max_rank=max_rank)
    share = slots.take(random_adapter(args, AdapterConfig(r=rank, target_modules=cell.modules)))
    for slot in range(cell.adapters):
        slots.put(slot, share)
    tokens = cell.sequences * cell.length
    config = EngineConfig(max_seq_len=cell.context, max_batch_size=cell.sequences, max_step_tokens=tokens)
    runner = Runner(transformer, cache, device, config, AdapterStore(args, slots, None, is_sorted=False))
    plans = [cell.plan(with_adapters=with_adapters) for with_adapters in (False, True)]
    clock, found = time.thread_time if one_thread else time.perf_counter, []
    for index in tqdm(range(-2, rounds), desc=name_of(cell), leave=False, disable=None):
        taken = [0.0, 0.0]
        for which in (0, 1) if index % 2 else (1, 0):
            start = clock()
            logits = runner.run(plans[which])
            assert logits is not None
            logits[0, 0].item()
            taken[which] = clock() - start
        if index >= 0:
            found.append(taken[0] / taken[1])
    runner.close()
    return found


class Server:
    """An engine, and `registered` adapters by name, of which requests ask for ACTIVE."""

    def __init__(self, model: RandomModel, place: Path, registered: int, config: EngineConfig) -> None:
        """`place` has ACTIVE adapters, by their numbers: more are these under other names."""
        folder = place / f"{registered}-registered"
        folder.mkdir()
        for index in range(registered):
            (folder / f"adapter-{index}").symlink_to(place / str(index % ACTIVE))
        start = time.perf_counter()
        self._adapters = Adapters(folder)
        self.start_seconds = time.perf_counter() - start
        self._engine = model.engine(config)
        names = self._adapters.names
        self._names = names[: ACTIVE * (registered // ACTIVE) : registered // ACTIVE]
        self._answer(names[:HELD_ADAPTERS], new_tokens=1)  # host memory is full
        self.run()

    def run(self) -> None:
        """A request for each adapter, to the last token."""
        self._answer(self._names, new_tokens=NEW_TOKENS)

    def _answer(self, names: Sequence[str], *, new_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_new_tokens=new_tokens, ignore_eos=True)
        for index, name in enumerate(names):
            request = Request(
                request_id=str(index),
                prompt_ids=(1 + index,) * NEW_TOKENS,
                params=params,
                adapter=self._adapters.named(name),
            )
            self._engine.add(request)
        while self._engine.has_work:
            for output in self._engine.step():
                assert output.finish_reason != "error", output.problem


def ratios_of_registered(
    model: RandomModel, *, rank: int, max_rank: int, rounds: int, one_thread: bool
) -> tuple[list[float], float]:
    """Seconds of requests where ACTIVE adapters are registered, over those of the same where REGISTERED are, of each
    round; and the seconds that it takes to register these.
    """
    config = EngineConfig(
        max_seq_len=2 * NEW_TOKENS, max_batch_size=ACTIVE, max_loras=ACTIVE, max_lora_rank=max_rank, prefix_cache=False
    )
    args, adapter_config = model.model.args, AdapterConfig(r=rank)
    clock, found = time.thread_time if one_thread else time.perf_counter, []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(ACTIVE):
            pairs = random_adapter(args, adapter_config, model.model.dtype).pairs
            write_adapter(Path(folder, str(index)), pairs, adapter_config, args)
        servers = [Server(model, Path(folder), count, config) for count in (ACTIVE, REGISTERED)]
        for index in tqdm(range(rounds), desc=NAME_OF_REGISTERED, leave=False, disable=None):
            taken = [0.0, 0.0]
            for which in (0, 1) if index % 2 else (1, 0):
                start = clock()
                servers[which].run()
                taken[which] = clock() - start
            found.append(taken[0] / taken[1])
    return found, servers[1].start_seconds


def seconds_of_loads(model: RandomModel, *, rank: int, max_rank: int) -> dict[str, list[float]]:
    """Of ACTIVE loads beside BESIDE_LOADS sequences that decode: until requests have the adapter, and of the longest
    step meanwhile; and of as many steps before.
    """
    config = EngineConfig(max_seq_len=1024, max_batch_size=BESIDE_LOADS, max_loras=ACTIVE, max_lora_rank=max_rank)
    engine, args, adapter_config = model.engine(config), model.model.args, AdapterConfig(r=rank)
    params = SamplingParams(temperature=0, max_new_tokens=1024 - NEW_TOKENS, ignore_eos=True)
    for index in range(BESIDE_LOADS):
        prompt = (1 + index,) * NEW_TOKENS
        engine.add(Request(request_id=str(index), prompt_ids=prompt, params=params))

    def step() -> tuple[float, list[Output]]:
        start = time.perf_counter()
        outputs = engine.step()
        return time.perf_counter() - start, outputs

    found: dict[str, list[float]] = {"step": [step()[0] for _ in range(2 * ACTIVE)][ACTIVE:], "load": [], "longest": []}
    with tempfile.TemporaryDirectory() as folder:
        for index in range(ACTIVE):
            pairs = random_adapter(args, adapter_config, model.model.dtype).pairs
            write_adapter(Path(folder, str(index)), pairs, adapter_config, args)
            errand = Errand(request_id=f"load {index}", kind="load", adapter=AdapterRef.of(Path(folder, str(index))))
            engine.run_errand(errand)
            steps, is_there = [], False
            while not is_there:
                seconds, outputs = step()
                steps.append(seconds)
                is_there = any(output.request_id == errand.request_id for output in outputs)
            found["load"].append(sum(steps))
            found["longest"].append(max(steps))
    return found


def random_adapter(args: ModelArgs, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> Adapter:
    shapes = hf_shapes(args)
    pairs = {
        weight: LoraPair(
            a_RC=(torch.randn(target.rank, shapes[weight][1]) / shapes[weight][1] ** 0.5).to(dtype),
            b_FR=(torch.randn(shapes[weight][0], target.rank) / 100).to(dtype),
            scaling=target.scaling,
        )
        for weight, target in targets(config, args).items()
    }
    return Adapter(identity=b"", pairs=pairs)


def name_of(cell: Cell) -> str:
    modules = "all linear" if cell.modules == ALL_LINEAR else "q, v"
    return f"{cell.sequences} x {cell.length} tokens, {cell.adapters} adapters, {modules}"


def benchmark(
    *,
    shape: str = "135m",
    dtype: str = "bfloat16",
    rank: int = 8,
    max_rank: int = 16,
    rounds: int = 100,
    threads: int | None = None,
    device: str = "cpu",
    out: str = str(RESULTS / "adapters.json"),
) -> None:
    """Measure all cells, print a row for each, and write a JSON file.

    Args:
        shape: the architecture, see benchmarks/shapes.py.
        dtype: bfloat16 or float32.
        rank: that of the adapters.
        max_rank: that for which slots have room.
        rounds: steps with and without, each; of prompts and of whole requests a tenth.
        threads: PyTorch's; by default as many as it takes.
        device: cpu or cuda.
        out: the JSON file to write.
    """
    check_counts(rank=rank, max_rank=max_rank, rounds=rounds)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if threads is not None:
        check_counts(threads=threads)
        torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    init_process_group(torch.device(device))
    longest = max(cell.context for cell in CELLS)
    model = RandomModel(
        find_shape(shape), EngineConfig(max_seq_len=longest), dtype=DTYPES[dtype], device=torch.device(device)
    )
    figures, rows = [], []

    def record(name: str, found: list[float], wanted: float | None, **others: float) -> None:
        figures.append({"cell": name, "ratios": found, "median": statistics.median(found), **others})
        low, middle, high = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        rows.append([name, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", str(wanted or "")])

    one_thread = device == "cpu" and torch.get_num_threads() == 1
    for cell in CELLS:
        count = rounds if cell.length == 1 else -(-rounds // 10)
        found = ratios(model, cell, rank=rank, max_rank=max_rank, rounds=count, one_thread=one_thread)
        record(name_of(cell), found, cell.wanted)
    found, seconds = ratios_of_registered(
        model, rank=rank, max_rank=max_rank, rounds=-(-rounds // 10), one_thread=one_thread
    )
    record(NAME_OF_REGISTERED, found, WANTED_OF_REGISTERED, start_seconds=seconds)
    loads = seconds_of_loads(model, rank=rank, max_rank=max_rank)
    figures.append({"cell": f"loads beside {BESIDE_LOADS} sequences", "seconds": loads})
    print(table(["step", "with / without", "quartiles", "target"], rows))
    medians = {name: f"{1000 * statistics.median(seconds):.1f} ms" for name, seconds in loads.items()}
    print(f"a load {medians['load']}, its longest step {medians['longest']}, a step without {medians['step']}")
    settings = {"shape": shape, "dtype": dtype, "rank": rank, "max_rank": max_rank, "rounds": rounds}
    print(f"written to {save(out, 'adapters', {**settings, 'threads': torch.get_num_threads()}, figures)}")


if __name__ == "__main__":
    run(benchmark)
    if dist.is_initialized():
        dist.destroy_process_group()
