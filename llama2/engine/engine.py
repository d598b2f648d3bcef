"""Owns the step: requests in, one forward pass of the whole tensor-parallel group, text and tokens out.

Rank 0 leads: it schedules, has the plan run, and samples. The other ranks follow. Knows no HTTP and no threads: see
`llama2/engine/service_loop.py`; `llama2/engine/loading.py` builds an engine.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from llama2.config import EngineConfig, ModelArgs
from llama2.engine.adapter_loads import AdapterLoads
from llama2.engine.block_manager import BlockManager
from llama2.engine.detokenizer import Detokenizer
from llama2.engine.limits import Limits
from llama2.engine.lockstep import Lockstep
from llama2.engine.prompt_scores import PromptScores
from llama2.engine.residents import Residents
from llama2.engine.runner import Runner
from llama2.engine.sampler import Choice, Sampler
from llama2.engine.scheduler import Plan, Scheduler
from llama2.engine.sequence import Errand, Output, Request, Sequence
from llama2.engine.stats import EngineStats
from llama2.engine.transfer import row_index, select
from llama2.text.tokenizer import Tokenizer

# Adapters in host memory, where nobody says how many.
HELD_ADAPTERS = 64
# Between two looks whether an adapter has been read, where there is nothing else to do.
WAIT_SECONDS = 0.001


class Engine:
    """Continuous batching on one tensor-parallel group. Rank 0 calls `add` and `step`, the other ranks `follow`."""

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
        """`looks_ahead`: launch a step before the tokens of the previous one are read."""
        self.args = args
        self.config = config
        self.limits = Limits(
            vocab_size=args.vocab_size,
            max_seq_len=config.max_seq_len,
            max_batch_size=config.max_batch_size,
            max_loras=config.max_loras,
        )
        self.tokenizer = tokenizer
        self.rank, self.world_size = group.rank, group.world_size
        self._group = group
        self._blocks = BlockManager(num_blocks, config.block_size, prefix_cache=config.prefix_cache)
        residents = Residents(config.max_loras)
        self._scheduler = Scheduler(config, self._blocks, residents)
        held = config.max_cpu_loras or max(HELD_ADAPTERS, config.max_loras)
        self._adapters = AdapterLoads(group, residents, held, self._scheduler.adapters)
        self._sampler = Sampler(
            config.seed, eos_ids=[token_id for token_id in tokenizer.eos_ids if token_id < args.vocab_size]
        )
        self._detokenizer = Detokenizer(tokenizer, config.max_seq_len)
        self._looks_ahead = looks_ahead
        # The sequences that gain a token in the latest step, and the choice of these tokens, until it is read.
        self._unread: tuple[list[Sequence], Choice] | None = None
        self._arrivals = 0
        self._last_step_at: float | None = None

    def check(self, request: Request) -> None:
        """As `Limits.check`; any rank, any thread."""
        self.limits.check(request)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ValueError: as `check`, or a live request has the same id.
        """
        self.check(request)
        if self.is_live(request.request_id):
            raise ValueError(f"request_id must be unique among live requests, got {request.request_id!r} twice")
        identity = b"" if request.adapter is None else self._adapters.identity(request.adapter)
        if identity is None:
            self._adapters.wait(request)
        else:
            self._start(request, identity)

    def run_errand(self, errand: Errand) -> list[Output]:
        """Load or unload an adapter while steps go on. The Output that says how it went comes now, or from a step."""
        if errand.kind == "unload":
            self._adapters.unload(errand)
        elif self._adapters.identity(errand.adapter) is None:
            self._adapters.wait(errand)
        else:
            return [Output(request_id=errand.request_id, finish_reason="stop")]
        return []

    def _start(self, request: Request, identity: bytes) -> None:
        """Queue a request whose adapter, if it has one, is held."""
        sequence = Sequence.of(request, self._arrivals, identity)
        self._scheduler.add(sequence)
        self._arrivals += request.n
        self._detokenizer.open(sequence)
        if request.wants_prompt_logits:
            sequence.prompt_scores = PromptScores(request)

    def abort(self, request_id: str) -> list[Output]:
        """Drop a request; returns the last Output of each of its replies. An id that is not live is ignored."""
        return [
            *self._adapters.abort(request_id),
            *(
                Output(request_id=request_id, index=sequence.index, finish_reason="abort")
                for sequence in self._scheduler.abort(request_id)
            ),
        ]

    def is_live(self, request_id: str) -> bool:
        """Has some reply of the request not ended yet?"""
        return self._scheduler.is_live(request_id) or self._adapters.is_waiting(request_id)

    def step(self) -> list[Output]:
        """Run one forward pass of the group, and return its outputs.

        If the engine looks ahead, those of the pass before: its tokens are read while the device is busy with this
        one, and are all known when this one's are sampled.
        """
        told = self._advance_adapters() if self._adapters.has_work else []
        plan = self._scheduler.schedule()
        logits_RV = None if plan is None else self._group.call(Runner.run, plan)
        outputs = told + self._read()
        if plan is not None and logits_RV is not None:
            outputs += self._choose(plan, logits_RV)
            if not self._looks_ahead:
                outputs += self._read()
            self._last_step_at = time.monotonic()
        return outputs

    def preempt_all(self) -> list[Output]:
        """Free every block: running sequences wait until the next step. Returns the outputs of the last one."""
        outputs = self._read()
        self._scheduler.preempt_all()
        return outputs

    def reset_prefix_cache(self) -> None:
        """Forget which blocks hold a known prefix; sequences that run keep theirs."""
        self._blocks.forget_prefixes()

    @property
    def has_work(self) -> bool:
        """Would `step` do anything?"""
        return self._scheduler.has_work or self._unread is not None or self._adapters.has_work

    @property
    def holds_blocks(self) -> bool:
        """Would `preempt_all` do anything?"""
        return self._scheduler.num_running > 0 or self._unread is not None

    def release(self, result: Any = None) -> Any:
        """Rank 0: end `follow` on the other ranks, where it returns `result`."""
        return self._group.release(result)

    def follow(self) -> Any:
        """A rank other than 0: take part in rank 0's steps until it releases the group; returns its result."""
        return self._group.follow()

    def close(self) -> None:
        """Rank 0: release the other ranks. Another rank: take part until then.

        All ranks call it before they end the process group, whose calls the engine may have recorded.
        """
        self.release() if self.rank == 0 else self.follow()
        self._group.close()

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting + self._adapters.num_waiting,
            free_blocks=self._blocks.num_free,
            total_blocks=self._blocks.num_blocks,
            steps=self._group.steps,
            prompt_tokens=self._scheduler.num_prompt_tokens,
            cached_tokens=self._scheduler.num_cached_tokens,
            last_step_at=self._last_step_at,
        )

    def check_integrity(self) -> None:
        """Check that every block is free or in a live sequence.

        Raises:
            RuntimeError: a block leaked.
        """
        self._scheduler.check_integrity()

    def _advance_adapters(self) -> list[Output]:
        ready, outputs = self._adapters.advance()
        for request in ready:
            assert request.adapter is not None
            self._start(request, self._adapters.identity(request.adapter) or b"")
        if not (ready or outputs or self._scheduler.has_work):
            time.sleep(WAIT_SECONDS)  # nothing to do but to wait for files
        return outputs

    def _choose(self, plan: Plan, logits_RV: torch.Tensor) -> list[Output]:
        """Sample for the sequences that are fully computed, record the step, and finish those that generate nothing."""
        rows: list[int] = []
        sequences: list[Sequence] = []
        prompts_only: list[Sequence] = []
        row = 0
        for chunk in plan.chunks:
            first, row = row, row + chunk.num_logits
            sequence = self._scheduler.running.get(chunk.key)
            if sequence is None:
                continue  # its last token was read after it was planned
            if chunk.logits == "all":
                assert sequence.prompt_scores is not None
                sequence.prompt_scores.keep(chunk.start, logits_RV[first:row])
            if chunk.end < sequence.num_tokens:
                continue
            if not sequence.request.generate:
                prompts_only.append(sequence)
                continue
            replies = [sequence]
            if sequence.num_forks:
                replies += self._scheduler.fork(sequence)
                for fork in replies[1:]:
                    self._detokenizer.open(fork)
            rows += [row - 1] * len(replies)
            sequences += replies
        if rows:
            choice = self._sampler.sample(select(logits_RV, row_index(rows, logits_RV)), sequences)
            if self._looks_ahead:
                self._group.keep([sequence.pool_place for sequence in sequences], choice.ids_R)
            self._unread = sequences, choice
        self._scheduler.advance(plan, sequences)
        outputs = []
        for sequence in prompts_only:
            self._scheduler.finish(sequence, "length")
            outputs.append(self._detokenizer.prompt_output(sequence))
        return outputs

    def _read(self) -> list[Output]:
        """Wait for the tokens of the latest step, and finish the sequences that end with them."""
        if self._unread is None:
            return []
        (sequences, choice), self._unread = self._unread, None
        by_key = {sequence.arrival: one for sequence, one in zip(sequences, choice.read(), strict=True)}
        gained = self._scheduler.update((sequence, by_key[sequence.arrival].token_id) for sequence in sequences)
        outputs = []
        for sequence in gained:
            output = self._detokenizer.extend(sequence, by_key[sequence.arrival])
            if output.finish_reason is not None:
                self._scheduler.finish(sequence, output.finish_reason)
            outputs.append(output)
        return outputs
