"""A peer: Hugging Face transformers, run by our own interpreter.

The loop is `generate`'s greedy one without its work around the model at each step, to the peer's advantage. Option
`static`: a static cache and a compiled model, which is what transformers advises on a GPU.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    __version__,
)

from benchmarks.peers.protocol import Done, Setup, Work, serve


class Transformers:
    version = __version__

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self._device = torch.device(setup.device)
        self._static = bool(setup.options.get("static"))
        self._model = load_model(setup)
        self._decode: Any = self._model
        if self._static:
            self._decode = torch.compile(self._model, mode="reduce-overhead", fullgraph=True)
        self._seen: set[tuple[int, int]] = set()
        self._static_cache: StaticCache | None = None
        self._static_shape = (0, 0)

    @torch.inference_mode()
    def run(self, work: Work) -> Done:
        shape = (len(work.prompts), len(work.prompts[0]))
        if shape not in self._seen:
            self._seen.add(shape)
            self._run(work if self._static else Work(prompts=work.prompts, new_tokens=2))
        return self._run(work)

    def _run(self, work: Work) -> Done:
        prompt_BT = torch.tensor(work.prompts, device=self._device)
        cache = self._cache(len(work.prompts), prompt_BT.shape[1] + work.new_tokens + 1)
        started = self._now()
        token_B1 = self._step(self._model, prompt_BT, cache, 0)
        tokens = [token_B1]
        prefilled = self._now()
        for position in range(prompt_BT.shape[1], prompt_BT.shape[1] + work.new_tokens):
            token_B1 = self._step(self._decode, token_B1, cache, position)
            tokens.append(token_B1)
        replies = torch.cat(tokens, dim=1).tolist()
        return Done(prefill_seconds=prefilled - started, decode_seconds=self._now() - prefilled, token_ids=replies)

    def _step(self, model: torch.nn.Module, ids_BT: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
        position_T = torch.arange(start, start + ids_BT.shape[1], device=self._device)
        out = model(input_ids=ids_BT, past_key_values=cache, position_ids=position_T[None], logits_to_keep=1)
        # Copied out of the compiled graph's memory, which its next run overwrites.
        ids_B1: torch.Tensor = out.logits[:, -1].argmax(dim=-1, keepdim=True).clone()
        return ids_B1

    def _cache(self, batch: int, length: int) -> Cache:
        """An empty cache. A static one is kept for work of the same shape: a CUDA graph refers to its address."""
        if not self._static:
            return DynamicCache(config=self._model.config)
        if self._static_cache is None or self._static_shape != (batch, length):
            torch._dynamo.reset()  # else it would compile a second shape for sizes that may change, and give up at 8
            self._static_cache = StaticCache(config=self._model.config, max_cache_len=length)
            self._static_shape = (batch, length)
        self._static_cache.reset()
        return self._static_cache

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def load_model(setup: Setup) -> PreTrainedModel:
    """The model in the folder `setup.weights`, or one of its config with random weights."""
    dtype = getattr(torch, setup.dtype)
    model: PreTrainedModel
    with torch.device(setup.device):
        if setup.options["random_weights"]:
            config = AutoConfig.from_pretrained(setup.weights)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(setup.weights, dtype=dtype)
    return model


if __name__ == "__main__":
    serve(Transformers)
