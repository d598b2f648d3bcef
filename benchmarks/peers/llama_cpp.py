"""A peer: llama.cpp through llama-cpp-python's low-level calls, batched as in llama-batched-bench."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterable

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Done, Setup, Work, serve

# llama.cpp's own defaults: tokens submitted at once, and tokens computed at once.
BATCH, MICRO_BATCH = 2048, 512
LOG_WARNING = 3


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Drop llama.cpp's messages about each graph that it builds."""
    if level >= LOG_WARNING:
        sys.stderr.write(text.decode(errors="replace"))


class LlamaCpp:
    version = llama_cpp.__version__

    def __init__(self, setup: Setup) -> None:
        llama_cpp.llama_log_set(_log, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 999 if setup.device.startswith("cuda") else 0
        self._threads = setup.threads
        self._model = llama_cpp.llama_model_load_from_file(setup.weights.encode(), params)
        if not self._model:
            raise ValueError(f"llama.cpp cannot load {setup.weights}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._context = None
        self._shape = (0, 0)

    def run(self, work: Work) -> Done:
        shape = (len(work.prompts), len(work.prompts[0]) + work.new_tokens + 1)
        if shape != self._shape:
            self._open(*shape)
            self._run(Work(prompts=work.prompts, new_tokens=2))
        return self._run(work)

    def _open(self, sequences: int, length: int) -> None:
        """A context with a separate stream for each sequence: no sequence scans the others' keys."""
        if self._context:
            llama_cpp.llama_free(self._context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_seq_max = sequences
        params.n_batch, params.n_ubatch = BATCH, MICRO_BATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp has no room for {sequences} sequences of {length} tokens")
        self._shape = (sequences, length)

    def _run(self, work: Work) -> Done:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)
        length = len(work.prompts[0])
        started = time.perf_counter()
        first: list[int] = []
        rows = [
            (token, position, sequence, position == length - 1)
            for sequence, prompt in enumerate(work.prompts)
            for position, token in enumerate(prompt)
        ]
        for begin in range(0, len(rows), BATCH):
            first += self._decode(rows[begin : begin + BATCH])
        prefilled = time.perf_counter()
        replies, newest = [first], first
        for position in range(length, length + work.new_tokens):
            newest = self._decode([(token, position, sequence, True) for sequence, token in enumerate(newest)])
            replies.append(newest)
        ended = time.perf_counter()
        return Done(
            prefill_seconds=prefilled - started,
            decode_seconds=ended - prefilled,
            token_ids=[list(reply) for reply in zip(*replies, strict=True)],
        )

    def _decode(self, rows: Iterable[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of (token, position, sequence, wants logits); the most likely next token of those."""
        batch, count, wanted = self._batch, 0, 0
        for token, position, sequence, wants in rows:
            batch.token[count] = token
            batch.pos[count] = position
            batch.n_seq_id[count] = 1
            batch.seq_id[count][0] = sequence
            batch.logits[count] = wants
            count += 1
            wanted += wants
        batch.n_tokens = count
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode failed on {count} tokens")
        if not wanted:
            return []
        values = ctypes.cast(llama_cpp.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits_RV = np.ctypeslib.as_array(values, shape=(wanted, self._vocab_size))
        return [int(token) for token in logits_RV.argmax(axis=1)]


if __name__ == "__main__":
    serve(LlamaCpp)
