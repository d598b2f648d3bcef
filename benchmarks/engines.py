"""Owns the engine that is measured: one with a checkpoint's weights, or with random ones in a named shape.

The engine is the server's, driven by hand; under torchrun every rank makes one. Knows no peer and no figures.
"""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from benchmarks.limits import Sizes, read_parameters
from benchmarks.peers.protocol import Done, Work
from llama2.adapters.slots import AdapterSlots
from llama2.adapters.store import AdapterStore
from llama2.config import LORA_RANK, EngineConfig, ModelArgs
from llama2.engine.engine import Engine
from llama2.engine.loading import build_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request
from llama2.kv_cache import KV_FRACTION, bytes_per_block, cache_dtype
from llama2.machine.memory import free_memory
from llama2.machine.threads import undivided
from llama2.parallel.collectives import connect
from llama2.parallel.plan import build_mesh
from llama2.text.tokenizer import Tokenizer
from llama2.weights.loader import build_model
from llama2.weights.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One piece of work: `batch` prompts of `context` tokens."""

    batch: int
    context: int

    def length(self, new_tokens: int, max_step_tokens: int) -> int:
        """Positions of the longest sequence: the first, which decodes while the other prompts are computed."""
        early = math.ceil(self.batch * self.context / (max_step_tokens - self.batch))
        return self.context + early + new_tokens + 1

    def work(self, index: int, *, vocab_size: int, new_tokens: int, seed: int = 0) -> Work:
        """Round `index`: the same prompts for every engine, and used nowhere else."""
        generator = np.random.default_rng((seed, self.batch, self.context, index))
        prompts = generator.integers(0, vocab_size, (self.batch, self.context))
        return Work(prompts=prompts.tolist(), new_tokens=new_tokens)

    def reason_to_skip(self, engine: Engine, new_tokens: int) -> str | None:
        """Why the engine cannot do it; None if it can."""
        config = engine.config
        needed = self.length(new_tokens, config.max_step_tokens)
        if needed > config.max_seq_len:
            return f"its longest sequence takes {needed} positions, and max_seq_len is {config.max_seq_len}"
        blocks, there = self.batch * -(-needed // config.block_size), engine.stats().total_blocks
        if blocks > there:
            return f"memory holds {there * config.block_size} tokens of KV cache, not {blocks * config.block_size}"
        return None


class MeasuredEngine:
    """Rank 0: does the same work as a peer, on our engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._calls = count()
        self._seen: set[tuple[int, int]] = set()

    def run(self, work: Work) -> Done:
        """Do `work` and time it; see `Done`. Work of a new size is warmed up first.

        First the prompts alone, each with its first token. Then all of it again: steps are timed once all sequences
        decode. The first replies are then longer than the last: they gained a token in each step of the prefill.
        """
        size = len(work.prompts), len(work.prompts[0])
        if size not in self._seen:
            self._seen.add(size)
            # At full length: the first product of a size may select its kernel, and the first kernel of a kind compile.
            self._add(work, max_new_tokens=3)
            self._finish()
        return self._run(work)

    def _run(self, work: Work) -> Done:
        started = time.perf_counter()
        self._add(work, max_new_tokens=1)
        self._finish()
        prefill_seconds = time.perf_counter() - started
        replies: dict[str, list[int]] = {request_id: [] for request_id in self._add(work, max_new_tokens=None)}
        while not all(replies.values()):
            self._step(replies)
        started = time.perf_counter()
        for _ in range(work.new_tokens):
            self._step(replies)
        decode_seconds = time.perf_counter() - started
        for request_id in replies:
            self._engine.abort(request_id)
        self._finish()
        return Done(
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            token_ids=[reply[: work.new_tokens + 1] for reply in replies.values()],
        )

    def _add(self, work: Work, *, max_new_tokens: int | None) -> list[str]:
        params = SamplingParams(temperature=0, max_new_tokens=max_new_tokens, ignore_eos=True)
        ids = [str(next(self._calls)) for _ in work.prompts]
        for request_id, prompt in zip(ids, work.prompts, strict=True):
            self._engine.add(Request(request_id=request_id, prompt_ids=tuple(prompt), params=params))
        return ids

    def _finish(self) -> None:
        while self._engine.has_work:
            self._engine.step()

    def _step(self, replies: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            replies[output.request_id] += output.token_ids


def fit_memory(
    args: ModelArgs, config: EngineConfig, *, memory_share: float, dtype: torch.dtype, device: torch.device
) -> EngineConfig:
    """`config`, with a KV cache of `memory_share` of what loading leaves free where the default would not do.

    The process group must be set up.
    """
    ranks = dist.get_world_size()
    weights = (read_parameters(args) + args.vocab_size * args.dim) * dtype.itemsize / ranks
    tokens = config.max_batch_size * config.blocks_per_sequence * config.block_size
    kv = tokens * read_sizes(args, config, dtype).kv_per_token / min(ranks, args.n_kv_heads)
    free = free_memory(device)
    usual = KV_FRACTION[device.type] * (free - weights)
    fits = kv <= min(usual, memory_share * free - weights)
    return config if fits else replace(config, kv_memory_fraction=memory_share)


def read_sizes(args: ModelArgs, config: EngineConfig, dtype: torch.dtype, *, weight_bytes: int | None = None) -> Sizes:
    """What an engine with plain values of `dtype` reads; `weight_bytes` in a decoding step where weights are not."""
    kept = cache_dtype(config, dtype)
    return Sizes(
        weights=read_parameters(args) * dtype.itemsize if weight_bytes is None else weight_bytes,
        kv_per_token=bytes_per_block(args, block_size=1, n_kv_heads=args.n_kv_heads, dtype=kept),
    )


def random_engine(args: ModelArgs, config: EngineConfig, *, dtype: torch.dtype, device: torch.device) -> Engine:
    """An engine as `load_engine` makes it, with random weights. Called on every rank.

    Raises:
        ValueError: the model cannot be split over the ranks, or a sequence of max_seq_len does not fit.
    """
    return RandomModel(args, config, dtype=dtype, device=device).engine(config)


class RandomModel:
    """A model with random weights, from which engines of several sizes can be made. Created on every rank."""

    def __init__(self, args: ModelArgs, config: EngineConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        spec = Spec(args=args, dtype=dtype)
        self.mesh = build_mesh(spec, device.type)
        with undivided() as threads:
            self._collectives = connect(device, symm_mem_all_reduce=config.symm_mem_all_reduce)
            self.model = build_model(
                spec,
                self.mesh,
                self._collectives,
                device=device,
                max_seq_len=config.max_seq_len,
                threads=threads,
                fill=_draw,
            )
        self._tokenizer = MadeUpTokenizer(args.vocab_size)

    def engine(self, config: EngineConfig) -> Engine:
        """Its max_seq_len is at most the model's. Its slots take any adapter of the shape."""
        with undivided():
            adapters = None
            if config.max_loras:
                slots = self.slots(config.max_loras, max_rank=config.max_lora_rank or LORA_RANK)
                adapters = AdapterStore(self.model.args, slots, None, is_sorted=False)
            return build_engine(
                self.model, self.mesh, self._collectives, tokenizer=self._tokenizer, config=config, adapters=adapters
            )

    def slots(self, count: int, *, max_rank: int) -> AdapterSlots:
        """Memory for `count` adapters."""
        model = self.model
        return AdapterSlots(
            model.args, self.mesh, {}, num_slots=count, max_rank=max_rank, dtype=model.dtype, device=model.device
        )


def _draw(weights: Mapping[str, DTensor]) -> None:
    for name, weight in weights.items():
        share = weight.to_local()
        share.fill_(1) if name.endswith("norm.weight") else share.normal_(std=0.02)


class MadeUpTokenizer(Tokenizer):
    """The 256 bytes, and made-up words up to `vocab_size`: a reply's ids become text, as they do in the server.

    It cannot encode text, and needs no tokenizer library.
    """

    def __init__(self, vocab_size: int) -> None:
        words = (b" %d" % index for index in range(vocab_size - 256))
        pieces = [*(bytes([byte]) for byte in range(256)), *words][:vocab_size]
        super().__init__(
            path=Path("made-up", "tokenizer"),
            pieces=pieces,
            special_tokens={},
            names={},
            adds_bos=False,
            word_starts=frozenset(),
        )

    def _encode(self, text: str, after_special: bool) -> list[int]:
        raise NotImplementedError("prompts come as token ids")

    def text_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace")
