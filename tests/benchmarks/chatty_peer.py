"""A peer that prints while it works, as libraries do, and answers with what it was asked. Started by test_peers.py."""

from __future__ import annotations

import os

from benchmarks.peers.protocol import Done, Setup, Work, serve


class Chatty:
    version = "1.0"

    def __init__(self, setup: Setup) -> None:
        print("loading", setup.weights, flush=True)

    def run(self, work: Work) -> Done:
        os.write(1, b'{"error": "from a library in C"}\n')
        threads = float(os.environ["OMP_NUM_THREADS"])
        return Done(prefill_seconds=threads, decode_seconds=float(work.new_tokens), token_ids=work.prompts)


if __name__ == "__main__":
    serve(Chatty)
