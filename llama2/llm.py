"""Owns the offline front: prompts in, completions out, on the engine that the server runs.

    llm = LLM("converted_checkpoints")
    llm.generate(["The capital of France is"], SamplingParams(temperature=0))

One process, or every rank under torchrun, with the same lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch

from llama2.config import EngineConfig
from llama2.engine.loading import load_engine
from llama2.engine.sequence import Completion, Output, Request, SamplingParams
from llama2.progress import progress
from llama2.text.chat import encode_dialog

Dialog = list[Mapping[str, str]]


class LLM:
    """A model and its engine. Under torchrun every rank makes the same calls and gets the same results."""

    def __init__(
        self,
        checkpoint_dir: Path | str,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tokenizer_path: Path | str | None = None,
        **options: Any,
    ) -> None:
        """`options` are the fields of `EngineConfig`; see `load_engine` for the rest.

        Raises:
            ValueError: the checkpoint, the tokenizer, the TP degree or a size is wrong.
        """
        self._engine = load_engine(
            checkpoint_dir,
            tokenizer_path=tokenizer_path,
            dtype=dtype,
            device=device,
            config=EngineConfig(**options),
        )
        self.tokenizer = self._engine.tokenizer
        self._calls = count()

    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue each prompt, given as text (BOS is added) or as ids (taken as they are), one reply each, in order.

        Raises:
            ValueError: a prompt is empty or too long, or there are not as many `params` as prompts.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts, got one string")
        encoded = [self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return self._complete(encoded, params, continues_prompt=True)

    def chat(
        self, dialogs: list[Dialog], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Completion]:
        """Answer each dialog, a list of {"role", "content"}, in the model's own chat format.

        Raises:
            ValueError: as `generate`, or roles are out of order, or a message holds a control tag.
        """
        if any(isinstance(dialog, Mapping) for dialog in dialogs):
            raise ValueError("dialogs must be a list of dialogs, each a list of messages; got a message in its place")
        encoded = [encode_dialog(self.tokenizer, dialog) for dialog in dialogs]
        return self._complete(encoded, params, continues_prompt=False)

    def score(self, token_ids: list[int]) -> torch.Tensor:
        """The logits (T, V), fp32 on the CPU, that the model gives after each of T ids."""
        request = Request(request_id=f"{next(self._calls)}", prompt_ids=tuple(token_ids), score=True, generate=False)
        (outputs,) = self._run([request])
        return cast(torch.Tensor, outputs[-1].prompt_logits)

    def close(self) -> None:
        """Let go of the GPUs' recordings. Under torchrun every rank calls it, before it ends the process group."""
        self._engine.close()

    def _complete(
        self,
        prompts: list[list[int]],
        params: SamplingParams | list[SamplingParams] | None,
        *,
        continues_prompt: bool,
    ) -> list[Completion]:
        if not isinstance(params, list):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"params must be one or as many as there are prompts ({len(prompts)}), got {len(params)}")
        call = next(self._calls)
        requests = [
            Request(request_id=f"{call}-{index}", prompt_ids=tuple(ids), params=one, continues_prompt=continues_prompt)
            for index, (ids, one) in enumerate(zip(prompts, params, strict=True))
        ]
        return [_completion(*one) for one in zip(requests, self._run(requests), strict=True)]

    def _run(self, requests: list[Request]) -> list[list[Output]]:
        """The outputs of each request, on every rank: rank 0 drives the engine, and the others follow its steps."""
        for request in requests:
            self._engine.check(request)
        if self._engine.rank != 0:
            return cast("list[list[Output]]", self._engine.follow())
        return cast("list[list[Output]]", self._engine.release(self._drive(requests)))

    def _drive(self, requests: list[Request]) -> list[list[Output]]:
        gained: dict[str, list[Output]] = {request.request_id: [] for request in requests}
        for request in requests:
            self._engine.add(request)
        try:
            with progress(total=len(requests), desc="generate", unit="reply", delay=2) as bar:
                while self._engine.has_work:
                    for output in self._engine.step():
                        if output.request_id in gained:  # else it was left over by an interrupted call
                            gained[output.request_id].append(output)
                            if output.finish_reason:
                                bar.update()
        except BaseException:
            for request in requests:
                self._engine.abort(request.request_id)
            raise
        return list(gained.values())


def _completion(request: Request, outputs: list[Output]) -> Completion:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Completion(
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=reason,
        prompt_tokens=len(request.prompt_ids),
        logprobs=None
        if request.params.logprobs is None
        else [logprobs for output in outputs for logprobs in output.logprobs],
    )
