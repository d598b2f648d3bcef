"""A peer: gpt-fast, from a clone of its repository, run by our own interpreter with random weights, batch 1.

Its prefill and its decoding are separate functions, which are timed where its `generate` calls them.
"""

from __future__ import annotations

import importlib
import sys
import time
import types
from typing import Any

import torch

from benchmarks.peers.protocol import Done, Setup, Work, serve


class GptFast:
    version = f"main, with torch {torch.__version__}"

    def __init__(self, setup: Setup) -> None:
        sys.path.insert(0, setup.options["clone"])
        # It imports tiktoken, which only text needs: prompts come as token ids.
        sys.modules["tokenizer"] = types.ModuleType("tokenizer")
        sys.modules["tokenizer"].__dict__["get_tokenizer"] = None
        generate: Any = importlib.import_module("generate")
        theirs: Any = importlib.import_module("model")
        ours = setup.options["model_args"]
        names = {"n_layer": "n_layers", "n_head": "n_heads", "n_local_heads": "n_kv_heads", "dim": "dim",
                 "intermediate_size": "hidden_dim", "vocab_size": "vocab_size", "rope_base": "rope_theta"}  # fmt: skip
        sizes = {name: ours[our_name] for name, our_name in names.items()}
        with torch.device("meta"):
            model = theirs.Transformer(theirs.ModelArgs(block_size=setup.max_length, **sizes))
        self._device = setup.device
        self._model = model.to(getattr(torch, setup.dtype)).to_empty(device=setup.device).eval()
        for parameter in self._model.parameters():
            parameter.data.normal_(std=0.02)
        generate.decode_one_token = torch.compile(generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
        generate.prefill = self._timed("prefill", torch.compile(generate.prefill, fullgraph=True, dynamic=True))
        generate.decode_n_tokens = self._timed("decode", generate.decode_n_tokens)
        self._generate = generate.generate
        self._seconds: dict[str, float] = {}
        self._context = 0

    def run(self, work: Work) -> Done:
        if len(work.prompts) > 1:
            raise ValueError("gpt-fast runs one sequence at a time")
        if len(work.prompts[0]) != self._context:
            self._context = len(work.prompts[0])
            self._model.max_seq_length = -1  # else the caches of a longer context would stay
            torch._dynamo.reset()  # and the compiled steps become dynamic in length
            self._run(work)
        return self._run(work)

    def _run(self, work: Work) -> Done:
        prompt_T = torch.tensor(work.prompts[0], dtype=torch.int, device=self._device)
        tokens, _ = self._generate(
            self._model, prompt_T, work.new_tokens + 1, 1, interactive=False, draft_model=None, temperature=0.8, top_k=1
        )
        replies = tokens.view(1, -1)[:, len(prompt_T) :].tolist()
        return Done(prefill_seconds=self._seconds["prefill"], decode_seconds=self._seconds["decode"], token_ids=replies)

    def _timed(self, name: str, function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            started = time.perf_counter()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            self._seconds[name] = time.perf_counter() - started
            return result

        return run


if __name__ == "__main__":
    serve(GptFast)
