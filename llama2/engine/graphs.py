"""Owns recorded passes: recorded once per size, and replayed with new contents in the same tensors.

Decode-only passes are recorded for some batch sizes, and passes with chunks of prompts for some numbers of tokens.
A smaller pass is padded with rows that belong to no sequence and write into the cache's scratch block, and with
sequences that have no row. A recording reads and writes at fixed addresses: its inputs, which a replay
overwrites first, and the logits, which the next replay overwrites.

A `Record` does the recording: CUDA graphs on a GPU; elsewhere anything that runs the same function again.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from typing import Protocol

import torch

from llama2.adapters.products import LoraProduct
from llama2.config import EngineConfig
from llama2.engine.inputs import Inputs, Sizes, host_inputs
from llama2.engine.scheduler import Chunk, Plan
from llama2.engine.token_pool import TokenPool
from llama2.kv_cache import KVCache
from llama2.model import Transformer
from llama2.progress import progress


class Recording(Protocol):
    """A procedure on fixed tensors that can be run again."""

    def replay(self) -> None: ...

    def reset(self) -> None:
        """Free what the recording holds; it can no longer be replayed."""


# Runs a procedure, and returns its recording.
Record = Callable[[Callable[[], None]], Recording]


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Of recorded decode-only passes: 1, 2, 4, 8, the multiples of 8 below the largest, and the largest."""
    sizes = (1, 2, 4, *range(8, max_batch_size, 8))
    return (*(size for size in sizes if size < max_batch_size), max_batch_size)


def token_sizes(largest: int) -> tuple[int, ...]:
    """Numbers of tokens of recorded passes with prompts: some below the largest, and the largest."""
    return (*(size for size in (32, 64, 128, 256, 384) if size < largest), largest)


class PassGraphs:
    """The recordings of one rank. All ranks must make them, run them and close them at the same points."""

    @torch.inference_mode()
    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        pool: TokenPool,
        device: torch.device,
        config: EngineConfig,
        record: Record,
        adapters: Items[Mapping[str, LoraProduct]] | None = None,
    ) -> None:
        """With the slots of `adapters` every pass is recorded with them: rows without one add nothing."""
        self._model = model
        self._cache = cache
        self._pool = pool
        self._device = device
        self._adapters = adapters
        self._batch_sizes = batch_sizes(config.max_batch_size)
        self._token_sizes = token_sizes(config.recorded_tokens)
        self._logits_RV: torch.Tensor | None = None
        leads = model.collectives.rank == 0
        if leads:
            shape = (config.max_batch_size, model.args.vocab_size)
            self._logits_RV = torch.empty(shape, dtype=torch.float32, device=device)
        most, blocks = config.max_batch_size, config.blocks_per_sequence
        # The key is whether a pass may hold prompts, and its number of tokens.
        sizes = {
            (True, size): Sizes(tokens=size, sequences=most, rows=most, blocks=blocks) for size in self._token_sizes
        }
        for size in self._batch_sizes:
            sizes[False, size] = Sizes(tokens=size, sequences=size, rows=size, blocks=blocks)
        self._inputs: dict[tuple[bool, int], Inputs] = {}
        self._recordings: dict[tuple[bool, int], Recording] = {}
        # A process group must outlive the recordings of its calls, also when the process ends.
        self.close = weakref.finalize(self, _reset, self._recordings)
        # The largest first: the others reuse its memory.
        order = sorted(sizes, key=lambda key: (key[1], key[0]), reverse=True)
        for key in progress(order, desc="record passes", unit="size", delay=2, disable=not leads):
            self._inputs[key] = Inputs(sizes[key], device)
            self._fill(key, ())
            self._recordings[key] = record(self._procedure(key))

    def takes(self, plan: Plan) -> bool:
        """Is it small enough, and are none of its logits needed after this step?"""
        has_prompts, tokens = _measure(plan)
        largest = (self._token_sizes if has_prompts else self._batch_sizes)[-1]
        return tokens <= largest and all(chunk.logits != "all" for chunk in plan.chunks)

    def run(self, plan: Plan) -> torch.Tensor | None:
        """On rank 0: fp32 logits (R, V) of the chunks that ask for them, overwritten by the next run."""
        has_prompts, tokens = _measure(plan)
        sizes = self._token_sizes if has_prompts else self._batch_sizes
        key = has_prompts, sizes[bisect_left(sizes, tokens)]
        rows = self._fill(key, plan.chunks)
        self._recordings[key].replay()
        return None if self._logits_RV is None else self._logits_RV[:rows]

    def _fill(self, key: tuple[bool, int], chunks: tuple[Chunk, ...]) -> int:
        """Write a pass's inputs; returns how many rows of logits it asks for."""
        rows, row = [], 0
        for chunk in chunks:
            row += chunk.length
            if chunk.logits == "last":
                rows.append(row - 1)
        inputs = self._inputs[key]
        host = host_inputs(inputs.sizes, self._device)
        host.fill(chunks, rows, self._cache)
        inputs.copy_(host)
        return len(rows)

    def _procedure(self, key: tuple[bool, int]) -> Callable[[], None]:
        (has_prompts, size), inputs = key, self._inputs[key]
        # Recorded kernels cannot use per-sequence values from the host.
        batch = inputs.batch((), None if has_prompts else size, self._cache, self._adapters)

        def compute() -> None:
            logits_RV = self._model(self._pool.gather(inputs), batch, inputs.rows_R)
            if self._logits_RV is not None:
                assert logits_RV is not None
                self._logits_RV[: inputs.sizes.rows].copy_(logits_RV)

        return compute


def _measure(plan: Plan) -> tuple[bool, int]:
    """Does a sequence have more than one token, and how many do all have?"""
    tokens = sum(chunk.length for chunk in plan.chunks)
    return tokens > len(plan.chunks), tokens


def _reset(recordings: dict[tuple[bool, int], Recording]) -> None:
    for recording in recordings.values():
        recording.reset()
    recordings.clear()


class CudaRecorder:
    """Records CUDA graphs that share the memory of their intermediates."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, procedure: Callable[[], None]) -> Recording:
        # One real run first: it compiles kernels and sets up libraries, which cannot be recorded.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            procedure()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process, such as NCCL's watchdog, may keep using the GPU.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            procedure()
        return graph


def choose_record(device: torch.device) -> Record | None:
    """How to record on `device`; None where launches are cheap compared with the work."""
    return CudaRecorder() if device.type == "cuda" else None
