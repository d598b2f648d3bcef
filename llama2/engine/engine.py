"""Owns the loop: requests in, steps of the whole tensor-parallel group, text and tokens out.

Rank 0 decides: it schedules, broadcasts the plan, samples. The other ranks follow. Knows no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from llama2.config import EngineConfig, ModelArgs
from llama2.engine.block_manager import BlockManager
from llama2.engine.lockstep import Lockstep, agree
from llama2.engine.prompt_scores import PromptScores
from llama2.engine.replies import Replies
from llama2.engine.runner import Runner
from llama2.engine.sampler import Choice, Sampler
from llama2.engine.scheduler import Plan, Scheduler
from llama2.engine.sequence import FinishReason, Output, Request, Sequence
from llama2.engine.transfer import row_index, select
from llama2.errors import InvalidValue, shown
from llama2.kv_cache import KVCache, count_blocks
from llama2.machine.threads import hand_over, undivided
from llama2.model import Transformer
from llama2.parallel.collectives import Collectives, connect
from llama2.parallel.plan import build_mesh, local_kv_heads
from llama2.parallel.process_group import choose_device, init_process_group
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from llama2.weights.loader import load_model
from llama2.weights.readers.dcp import DcpFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A look at rank 0's engine. `seconds_since_step` is None before the first step.

    `prompt_tokens` counts those of all sequences that were started, `cached_tokens` those of them that did not have to
    be computed.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    seconds_since_step: float | None


class Engine:
    """Continuous batching on one tensor-parallel group. Make one on every rank with `from_checkpoint`.

    Rank 0 either drives it by hand (`add`, `step`) or starts a thread (`start`, then `add`, `abort` and `poll` from
    anywhere). The other ranks call `follow`, or `start`.
    """

    def __init__(
        self,
        *,
        args: ModelArgs,
        config: EngineConfig,
        tokenizer: Tokenizer,
        group: Lockstep,
        num_blocks: int,
        looks_ahead: bool,
    ) -> None:
        """`looks_ahead`: a step is on its way to the device before the tokens of the one before are read."""
        self.args = args
        self.config = config
        self.tokenizer = tokenizer
        self.rank = group.rank
        self._group = group
        self._blocks = BlockManager(num_blocks, config.block_size, prefix_cache=config.prefix_cache)
        self._scheduler = Scheduler(config, self._blocks)
        self._sampler = Sampler(config.seed)
        self._replies = Replies(tokenizer, config.max_seq_len)
        self._scores: dict[str, torch.Tensor] = {}
        self._prompts = PromptScores()
        self._looks_ahead = looks_ahead
        # Of the latest step: who gains a token, and the choice of them, until it is read.
        self._unread: tuple[list[Sequence], Choice] | None = None
        self._arrivals = 0
        self._last_step_at: float | None = None
        self._lock = threading.Condition()
        self._inbox: deque[Request | str] = deque()  # a request to add, or the id of one to abort
        self._outbox: list[Output] = []
        self._known: set[str] = set()
        self._closing = False
        self._suspended = False
        self._thread: threading.Thread | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint_dir: Path | str,
        *,
        tokenizer_path: Path | str | None = None,
        model_args_path: Path | str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        config: EngineConfig,
    ) -> Engine:
        """Load a converted checkpoint over all ranks of the process group, which is set up here if need be.

        `dtype` is bf16 on a GPU and the checkpoint's own on a CPU unless said otherwise. Called on every rank.

        Raises:
            ValueError: the checkpoint, the tokenizer, the degree or a size is wrong.
            LockstepError: the ranks were given different settings.
        """
        args = ModelArgs.load(model_args_path or checkpoint_dir)
        tokenizer = load_tokenizer(tokenizer_path or checkpoint_dir)
        if tokenizer.vocab_size > args.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but the model only {args.vocab_size}: "
                "they do not belong together"
            )
        checkpoint = DcpFolder(checkpoint_dir, args)
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else checkpoint.dtype)
        init_process_group(device)
        mesh = build_mesh(args, device.type)
        with undivided() as threads:
            collectives = connect(device, symm_mem_all_reduce=config.symm_mem_all_reduce)
            model = load_model(
                checkpoint,
                mesh,
                collectives,
                dtype=dtype,
                device=device,
                max_seq_len=config.max_seq_len,
                threads=threads,
            )
            return cls.from_model(model, mesh, collectives, tokenizer=tokenizer, config=config)

    @classmethod
    def from_model(
        cls,
        model: Transformer,
        mesh: DeviceMesh,
        collectives: Collectives,
        *,
        tokenizer: Tokenizer,
        config: EngineConfig,
    ) -> Engine:
        """An engine for a model that is ready to run positions up to `config.max_seq_len`. Called on every rank.

        Raises:
            ValueError: the memory of some rank does not hold one sequence of that length, or the KV cache asked for.
            LockstepError: the ranks were given different settings.
        """
        args, dtype, device = model.args, model.norm.weight.dtype, model.norm.weight.device
        n_kv_heads = local_kv_heads(args, mesh)
        num_blocks = agree(
            (args, config, dtype, tokenizer.vocab_size),
            lambda: count_blocks(
                args,
                config,
                n_kv_heads=n_kv_heads,
                dtype=dtype,
                device=device,
                rank=collectives.rank,
                degree=collectives.world_size,
            ),
        )
        cache = KVCache(
            args,
            num_blocks=num_blocks,
            block_size=config.block_size,
            n_kv_heads=n_kv_heads,
            dtype=dtype,
            device=device,
        )
        if collectives.rank == 0:
            logger.info(
                "TP=%d on %s, %s, KV cache of %d blocks of %d tokens",
                collectives.world_size, device.type, dtype, num_blocks, config.block_size,
            )  # fmt: skip
        engine = cls(
            args=args,
            config=config,
            tokenizer=tokenizer,
            group=Lockstep(Runner(model, cache, device, config), collectives),
            num_blocks=num_blocks,
            # A CPU has computed a step when the call returns.
            looks_ahead=device.type != "cpu",
        )
        if engine.rank == 0 and device.type != "cpu":
            engine._sampler.warm_up(args.vocab_size, config.max_batch_size, device)
        return engine

    # ---- rank 0, from any thread ----

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check`, or a live request has the same id.
        """
        self.check(request)
        with self._lock:
            if request.request_id in self._known:
                raise ValueError(f"request_id must be unique among live requests, got {request.request_id!r} twice")
            self._known.add(request.request_id)
            self._inbox.append(request)
            self._lock.notify_all()

    def check(self, request: Request) -> None:
        """Refuse a request that can never run; any rank, any thread.

        Raises:
            ValueError: it is empty or too long, or (InvalidValue) an id is outside the vocabulary.
        """
        length, longest = len(request.prompt_ids), self.config.max_seq_len
        room = longest - request.generate
        if not 1 <= length <= room:
            raise ValueError(
                f"the prompt has {length} tokens, but must have from 1 to {room}: max_seq_len is {longest}"
                + (" and the reply needs at least one" if request.generate else "")
            )
        if request.n > self.config.max_batch_size:
            raise InvalidValue("n", f"must be at most max_batch_size={self.config.max_batch_size}, got {request.n}")
        params = request.params
        named = {
            "prompt_ids": request.prompt_ids,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
        }
        for name, ids in named.items():
            wrong = [token_id for token_id in ids if not 0 <= token_id < self.args.vocab_size]
            if wrong:
                raise InvalidValue(name, f"must be from 0 to {self.args.vocab_size - 1}, got {shown(wrong[0])}")

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step; its last Output says "abort". An id that is not live is ignored."""
        with self._lock:
            self._inbox.append(request_id)
            self._lock.notify_all()

    def suspend(self) -> None:
        """Stop computing after this step and free every block, without a loss: `resume` goes on where it was."""
        with self._lock:
            self._suspended = True
            self._lock.notify_all()

    def resume(self) -> None:
        """End `suspend`; nothing happens if it did not begin."""
        if self._suspended:
            with self._lock:
                self._suspended = False
                self._lock.notify_all()

    def poll(self, timeout: float) -> list[Output]:
        """What the engine thread has made since the last poll; waits up to `timeout` seconds for the first of it."""
        with self._lock:
            self._lock.wait_for(lambda: self._outbox, timeout)
            outputs, self._outbox = self._outbox, []
            return outputs

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + len(self._inbox),
            free_blocks=self._blocks.num_free,
            total_blocks=self._blocks.num_blocks,
            steps=self._group.steps,
            prompt_tokens=self._scheduler.num_prompt_tokens,
            cached_tokens=self._scheduler.num_cached_tokens,
            seconds_since_step=None if self._last_step_at is None else time.monotonic() - self._last_step_at,
        )

    # ---- the loop, on every rank ----

    def start(self, on_failure: Callable[[BaseException], None]) -> None:
        """Run the loop in a thread of its own; `on_failure` is called there with what ended it before `close`.

        From now on the calling thread divides no operator among processors: those are the engine's.
        """
        take_over = hand_over()

        def main() -> None:
            take_over()
            try:
                self._serve() if self.rank == 0 else self.follow()
            except BaseException as error:
                logger.exception("rank %d: the engine failed at step %d", self.rank, self._group.steps)
                on_failure(error)

        self._thread = threading.Thread(target=main, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Rank 0: end the loop and let the other ranks go. Another rank: take part until rank 0 did so.

        All ranks call it before they end the process group, of which the engine may have recorded calls.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
        elif self.rank == 0:
            self.release()
        else:
            self.follow()
        self._group.close()

    def release(self, result: Any = None) -> Any:
        """Rank 0: end `follow` on the other ranks, where it returns `result`."""
        return self._group.release(result)

    def follow(self) -> Any:
        """A rank other than 0: take part in rank 0's steps until it releases the group; returns what it sent along."""
        return self._group.follow()

    def step(self) -> list[Output]:
        """Rank 0: take in what arrived, run one forward pass of the group, and return what came of it.

        Where the engine looks ahead, what came of the pass before: its tokens are read while the device is busy with
        this one, and this one's are chosen with all of them known.
        """
        suspended = self._suspended
        outputs = self._take_in()
        plan = None if suspended else self._scheduler.schedule()
        logits_RV = None if plan is None else self._group.lead(plan)
        outputs += self._read()
        if plan is not None and logits_RV is not None:
            outputs += self._choose(plan, logits_RV)
            if not self._looks_ahead:
                outputs += self._read()
            self._last_step_at = time.monotonic()
        if suspended:
            self._scheduler.preempt_all()
        return outputs

    @property
    def has_work(self) -> bool:
        """Rank 0: would `step` do anything?"""
        return bool(self._inbox) or self._scheduler.has_work or self._unread is not None

    @property
    def _may_step(self) -> bool:
        return bool(self._inbox or self._scheduler.num_running or self._unread) if self._suspended else self.has_work

    def check_integrity(self) -> None:
        """Prove that every block is free or in a live sequence; with no live sequence, that all came home.

        Raises:
            RuntimeError: a block leaked, or state of a finished request was kept.
        """
        self._scheduler.check_integrity()
        kept = len(self._replies) + len(self._scores) + len(self._prompts)
        if kept and not self._scheduler.has_work:
            raise RuntimeError(f"state of {kept} finished requests was kept")

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """Rank 0, without a thread: fp32 logits (T, V) on the CPU after each of `token_ids`."""
        assert self._thread is None
        request = Request(request_id="score", prompt_ids=tuple(token_ids), score=True, generate=False)
        self.add(request)
        while self.has_work:
            self.step()
        return self._scores.pop(request.request_id)

    # ---- inside ----

    def _take_in(self) -> list[Output]:
        with self._lock:
            arrived = list(self._inbox)
            self._inbox.clear()
        outputs = []
        for item in arrived:
            if isinstance(item, Request):
                sequence = Sequence.of(item, self._arrivals)
                self._arrivals += item.n
                self._scheduler.add(sequence)
                self._replies.open(sequence)
            else:
                for sequence in self._scheduler.abort(item):
                    self._forget(sequence)
                    outputs.append(Output(request_id=item, index=sequence.index, finish_reason="abort"))
        return outputs

    def _choose(self, plan: Plan, logits_RV: torch.Tensor) -> list[Output]:
        """Sample where a prompt or a reply has reached its end, book the step, and end what was a prompt only."""
        rows: list[int] = []
        sequences: list[Sequence] = []
        prompts_only: list[Sequence] = []
        row = 0
        for chunk in plan.chunks:
            first, row = row, row + {"none": 0, "last": 1, "all": len(chunk.token_ids)}[chunk.logits]
            sequence = self._scheduler.running.get(chunk.key)
            if sequence is None:
                continue  # its last token was read since it was planned
            if chunk.logits == "all":
                self._prompts.keep(sequence, chunk.start, logits_RV[first:row])
            if chunk.start + len(chunk.token_ids) < len(sequence.token_ids):
                continue
            if not sequence.request.generate:
                prompts_only.append(sequence)
                continue
            replies = [sequence]
            if sequence.num_forks:
                replies += self._scheduler.fork(sequence)
                for fork in replies[1:]:
                    self._replies.open(fork)
            rows += [row - 1] * len(replies)
            sequences += replies
        if rows:
            choice = self._sampler.sample(select(logits_RV, row_index(rows, logits_RV)), sequences)
            if self._looks_ahead:
                self._group.feed(choice.ids_R)
            self._unread = sequences, choice
        self._scheduler.advance(plan, sequences)
        outputs = []
        for sequence in prompts_only:
            request_id = sequence.request.request_id
            logits, logprobs = self._prompts.take_logits(sequence), self._prompts.take_logprobs(sequence)
            if logits is not None:
                self._scores[request_id] = logits
            self._finish(sequence, "length")
            outputs.append(Output(request_id=request_id, prompt_logprobs=logprobs, finish_reason="length"))
        return outputs

    def _read(self) -> list[Output]:
        """Wait for the tokens of the latest step, and end what has ended."""
        if self._unread is None:
            return []
        (sequences, choice), self._unread = self._unread, None
        by_key = {sequence.arrival: one for sequence, one in zip(sequences, choice.read(), strict=True)}
        gained = self._scheduler.update((sequence, by_key[sequence.arrival].token_id) for sequence in sequences)
        outputs = []
        for sequence in gained:
            prompt_logprobs = self._prompts.take_logprobs(sequence)
            output = self._replies.extend(sequence, by_key[sequence.arrival], prompt_logprobs)
            if output.finish_reason is not None:
                self._finish(sequence, output.finish_reason)
            outputs.append(output)
        return outputs

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._scheduler.finish(sequence, reason)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._replies.forget(sequence)
        self._prompts.forget(sequence)
        if not self._scheduler.is_live(sequence.request.request_id):
            with self._lock:
                self._known.discard(sequence.request.request_id)

    def _serve(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or self._may_step)
                if self._closing:
                    break
            outputs = self.step()
            with self._lock:
                self._outbox += outputs
                self._lock.notify_all()
        self.release()
