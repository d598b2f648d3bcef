"""Owns the offline front: prompts in, completions out, on the engine that the server runs.

    llm = LLM("converted_checkpoints")
    llm.generate("The capital of France is", temperature=0, max_new_tokens=20)

One process, or every rank under torchrun, with the same lines. `AsyncLLM` is the same for coroutines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch

from llama2.arguments import Dialog, Parameters, Prompt
from llama2.engine.engine import Engine
from llama2.engine.sequence import Completion, Output, Reply, Request
from llama2.engine.turns import Gains, Turns
from llama2.errors import InvalidValue
from llama2.opening import open_model
from llama2.progress import progress


class LLM:
    """A model and its engine. Under torchrun every rank makes the same calls and gets the same results.

    In one process several threads may use it, and their requests are computed together; under torchrun one thread of
    each rank. `close`, or the end of a `with` block, or `del` gives the memory back.
    """

    def __init__(
        self,
        checkpoint_dir: Path | str | None = None,
        *,
        model: Path | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        tokenizer_path: Path | str | None = None,
        **options: Any,
    ) -> None:
        """`checkpoint_dir`, or `model`, is the folder that the converter wrote; `options` are the fields of
        `EngineConfig`; see `load_engine` for the rest.

        Raises:
            ValueError: the checkpoint, the tokenizer, the TP degree or an option is wrong.
        """
        engine, self._arguments = open_model(
            checkpoint_dir, model=model, dtype=dtype, device=device, tokenizer_path=tokenizer_path, **options
        )
        self.tokenizer = engine.tokenizer
        self._turns = Turns(engine)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Continue each prompt, given as text (BOS is added) or as ids (taken as they are), in order.

        Args:
            prompts: a list, or one text, which gives a list of one completion.
            params: for all prompts, or one each; `sampling_params` is another name of it. A completion has at most 128
                tokens if they say nothing else.
            use_tqdm: whether rank 0 shows a progress bar of the replies, after two seconds.
            options: fields of `SamplingParams`, which win over `params`; and what all replies are held to, one of
                `json_schema` (a dict, JSON text, or a pydantic model), `regex`, `choice` (a list of texts) and
                `grammar` (llguidance's Lark syntax). A reply that could not be held to it has the finish_reason
                "error". And `adapter`, a folder in PEFT's format for all prompts, or a list with one or None for each;
                it needs `LLM(…, max_loras=8)`.

        Raises:
            ValueError: an argument is wrong, or a prompt is empty or too long; nothing has run then. Or an adapter is
                not one of this model.
        """
        return self._complete(self._arguments.completions(prompts, params, sampling_params, **options), use_tqdm)

    def chat(
        self,
        dialogs: Dialog | Sequence[Dialog],
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> list[Completion]:
        """Answer each dialog, a list of {"role", "content"}, in the model's own chat format.

        One dialog alone gives a list of one completion. A reply has as many tokens as fit if `params` say nothing else.
        Otherwise as `generate`.

        Raises:
            ValueError: as `generate`, or roles are out of order, or a message holds a control tag.
        """
        return self._complete(self._arguments.chats(dialogs, params, sampling_params, **options), use_tqdm)

    def stream(
        self,
        prompt: Prompt | Dialog,
        params: Parameters = None,
        *,
        sampling_params: Parameters = None,
        **options: Any,
    ) -> Iterator[Output]:
        """Continue one prompt, or answer one dialog, in pieces: each has `text` and `token_ids`, and the last one of a
        reply a `finish_reason`. Of `n` replies each piece has the `index`. Otherwise as `generate`.

        To leave the loop early aborts the request. Under torchrun all ranks get the same pieces, and leave at the same.

        Raises:
            ValueError: as `generate` and `chat`, at the call.
        """
        request = self._arguments.one(prompt, params, sampling_params, **options)
        self._engine.check(request)  # a closed one says so now, and not at the first piece
        return self._pieces(request)

    def score(
        self, token_ids: Sequence[int], *, adapter: Path | str | None = None, use_tqdm: bool = True
    ) -> torch.Tensor:
        """The logits (T, V), fp32 on the CPU, that the model gives after each of T ids.

        Raises:
            ValueError: there are none or too many, or one is outside the vocabulary.
        """
        ((output,),) = self._run([self._arguments.score(token_ids, adapter)], use_tqdm)
        return cast(torch.Tensor, output.prompt_logits)

    def reset_prefix_cache(self) -> None:
        """Forget earlier prompts: the next ones take as long as if they were the first. Under torchrun as any call."""
        self._turns.reset_prefix_cache()

    def close(self) -> None:
        """Give the memory back, on a GPU that of recorded passes, too. Calls after it raise RuntimeError.

        Under torchrun every rank calls it, before it ends the process group.
        """
        self._turns.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def _engine(self) -> Engine:
        return self._turns.engine

    def _complete(self, requests: list[Request], use_tqdm: bool) -> list[Completion]:
        return [completion(*one) for one in zip(requests, self._run(requests, use_tqdm), strict=True)]

    def _run(self, requests: list[Request], use_tqdm: bool = True) -> list[list[Output]]:
        """The outputs of each request."""
        quiet = self._engine.rank != 0 or not use_tqdm
        replies = sum(request.n for request in requests)
        with progress(total=replies, desc="generate", unit="reply", delay=2, disable=quiet) as bar:
            gains = Gains(requests, bar.update)
            self._turns.add(gains)
            try:
                self._turns.advance(lambda: not gains.unfinished)
            finally:
                self._turns.drop(gains)
        check_adapters(itertools.chain.from_iterable(gains.outputs.values()))
        return list(gains.outputs.values())

    def _pieces(self, request: Request) -> Iterator[Output]:
        gains = Gains([request])
        (outputs,) = gains.outputs.values()
        self._turns.add(gains)
        try:
            while outputs or gains.unfinished:
                self._turns.advance(lambda: bool(outputs))
                check_adapters(outputs)
                yield outputs.pop(0)
        finally:
            self._turns.drop(gains)


def check_adapters(outputs: Iterable[Output]) -> None:
    """Raises InvalidValue: some adapter cannot be had."""
    for output in outputs:
        if output.problem:
            raise InvalidValue("adapter", f"cannot be had: {output.problem}")


def completion(request: Request, outputs: Sequence[Output]) -> Completion:
    """All that a request has gained."""
    return Completion(
        prompt_tokens=len(request.prompt_ids),
        outputs=tuple(
            _reply(request, [output for output in outputs if output.index == index]) for index in range(request.n)
        ),
    )


def _reply(request: Request, outputs: Sequence[Output]) -> Reply:
    reason = outputs[-1].finish_reason
    assert reason is not None
    return Reply(
        text="".join(output.text for output in outputs),
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        finish_reason=reason,
        logprobs=None
        if request.params.logprobs is None
        else [logprobs for output in outputs for logprobs in output.logprobs],
    )
