"""Owns decoding without launches: passes of one token per sequence, recorded once per batch size and replayed.

Recorded are some sizes only, the buckets; a smaller batch is filled up with rows that write into the cache's scratch
block and whose logits nobody reads. What a recording reads and writes lies at fixed addresses: its inputs, which a
replay overwrites first, and the logits, which the next replay overwrites.

How something is recorded is a `Record`: on a GPU CUDA graphs, anywhere else whatever runs the same function again.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable

import torch
from tqdm import tqdm

from llama2.batch import Span
from llama2.config import EngineConfig
from llama2.engine.inputs import Inputs, LatestIds, Sizes, host_inputs
from llama2.engine.scheduler import Chunk, Plan
from llama2.kv_cache import KVCache
from llama2.model import Transformer

# Runs a procedure that works on fixed tensors, and returns what does the same again.
Record = Callable[[Callable[[], None]], Callable[[], None]]


def bucket_sizes(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 4, 8, then multiples of 8, as far as they are below `max_batch_size`; and that itself."""
    sizes = (1, 2, 4, *range(8, max_batch_size, 8))
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


class DecodeGraphs:
    """The recordings of one rank. All ranks must make them, and run them, at the same points."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        latest: LatestIds,
        device: torch.device,
        config: EngineConfig,
        record: Record,
    ) -> None:
        self._model = model
        self._cache = cache
        self._latest = latest
        self._device = device
        self._blocks = config.blocks_per_sequence
        self._sizes = bucket_sizes(config.max_batch_size)
        self._filler = Chunk(0, 0, (0,), array("i", [cache.scratch_block]), "last")
        self._logits_RV: torch.Tensor | None = None
        leads = model.output.collectives.rank == 0
        if leads:
            shape = (config.max_batch_size, model.args.vocab_size)
            self._logits_RV = torch.empty(shape, dtype=torch.float32, device=device)
        self._inputs: dict[int, Inputs] = {}
        self._replays: dict[int, Callable[[], None]] = {}
        # The largest first: the others find room in the memory that it took.
        bar = tqdm(self._sizes[::-1], desc="record decoding", unit="batch size", delay=2, disable=not leads)
        for size in bar:
            self._inputs[size] = Inputs(self._sizes_of(size), device)
            self._fill(size, [])
            self._replays[size] = record(self._procedure(size))

    def takes(self, plan: Plan) -> bool:
        """Does every sequence bring one token, with no claim on its logits beyond this step?"""
        return all(len(chunk.token_ids) == 1 and chunk.logits != "all" for chunk in plan.chunks)

    def run(self, plan: Plan) -> torch.Tensor | None:
        """On rank 0: fp32 logits (R, V) of the chunks that ask for them, overwritten by the next run."""
        size = self._sizes[bisect_left(self._sizes, len(plan.chunks))]
        self._fill(size, list(plan.chunks))
        self._replays[size]()
        if self._logits_RV is None:
            return None
        rows = [row for row, chunk in enumerate(plan.chunks) if chunk.logits == "last"]
        if len(rows) == len(plan.chunks):
            return self._logits_RV[: len(rows)]
        return self._logits_RV[rows]

    def _sizes_of(self, size: int) -> Sizes:
        return Sizes(tokens=size, sequences=size, rows=size, blocks=self._blocks)

    def _fill(self, size: int, chunks: list[Chunk]) -> None:
        host = host_inputs(self._sizes_of(size), self._device)
        host.fill([*chunks, *[self._filler] * (size - len(chunks))], range(size), self._cache.block_size)
        self._inputs[size].copy_(host)

    def _procedure(self, size: int) -> Callable[[], None]:
        inputs = self._inputs[size]
        # No kernel that is recorded may ask the host how long a context is: here it says how long they can become.
        longest = self._blocks * self._cache.block_size
        spans = tuple(Span(row=row, length=1, context=longest) for row in range(size))
        batch = inputs.batch(spans, size, self._cache)

        def decode() -> None:
            logits_RV = self._model(self._latest.resolve(inputs.tokens_T), batch, inputs.rows_R)
            if self._logits_RV is not None:
                self._logits_RV[:size].copy_(logits_RV)

        return decode


class CudaRecorder:
    """Records CUDA graphs, which share the memory of what they compute in between."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, procedure: Callable[[], None]) -> Callable[[], None]:
        # Once for real: kernels are compiled and libraries set up, which a recording cannot hold.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            procedure()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process, such as NCCL's watchdog, may go on using the GPU.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            procedure()
        return graph.replay


def choose_record(device: torch.device) -> Record | None:
    """How to record on `device`; None where launches cost little beside the work."""
    return CudaRecorder() if device.type == "cuda" else None
