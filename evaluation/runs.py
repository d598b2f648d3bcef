"""Owns running a model over samples, all prompts of a run at once on the offline engine, and how long that takes.

Knows no metric.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from evaluation.config import Run, Settings
from evaluation.inputs import Inputs
from evaluation.prompts import Prompter, draw_examples
from llama2 import LLM
from llama2.adapters.config import AdapterConfig
from llama2.errors import InvalidValue


@dataclass(frozen=True, slots=True, kw_only=True)
class Replies:
    """A run's, in the order of the samples. `seconds` are from the first prompt to the last reply, without loading, and
    with nothing in the prefix cache at the beginning."""

    run: Run
    texts: Sequence[str]
    predictions: Sequence[str | None]
    seconds: float
    prompt_tokens: int
    new_tokens: int
    documents_cut: int


def run_all(settings: Settings, runs: Sequence[Run], inputs: Inputs) -> Iterator[Replies]:
    """Each run's replies; runs of one checkpoint in a row share a loaded model.

    Raises:
        ValueError: a folder, an option of the engine or a prompt is wrong; the message names the run.
    """
    for folder, group in groupby(runs, lambda run: run.checkpoint or settings.checkpoint):
        same = list(group)
        ranks = [AdapterConfig.load(run.adapter).highest_rank for run in same if run.adapter is not None]
        slots = {"max_loras": 1, "max_lora_rank": max(ranks)} if ranks else {}
        with LLM(folder, **{**slots, **settings.engine}) as llm:
            for run in same:
                try:
                    yield _ask(llm, settings, run, inputs)
                except ValueError as error:
                    raise ValueError(f"run {run.name}: {error}") from None


def _ask(llm: LLM, settings: Settings, run: Run, inputs: Inputs) -> Replies:
    task, continues = inputs.task, settings.prompt.format == "completion"
    prompter = Prompter(prompt=settings.prompt, labels=task.labels, tokenizer=llm.tokenizer)
    examples = draw_examples(inputs.train, run.shots, settings.seed, balanced=task.balanced)
    options: dict[str, Any] = {"temperature": 0, **task.options(llm.tokenizer, continues=continues)}
    if settings.max_new_tokens is not None:
        options["max_new_tokens"] = settings.max_new_tokens
    if run.adapter is not None:
        options["adapter"] = str(run.adapter)
    if continues:  # the next paragraph would be another sample
        options["stop"] = ["\n"]
    ask: Any = llm.generate if continues else llm.chat
    write: Any = prompter.completion if continues else prompter.dialog
    prompts = [write(sample.text, examples) for sample in inputs.test]
    try:
        # Not counted: what is loaded or compiled when it is first used. Earlier runs leave no prompts behind.
        ask(prompts[:1], use_tqdm=False, **options)
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        completions = ask(prompts, **options)
    except InvalidValue as error:
        if "[" not in error.field:
            raise
        raise ValueError(f"{error}; lower shots, of {run.shots}, or max_text_tokens") from None
    seconds = time.perf_counter() - begin
    texts = [completion.text for completion in completions]
    return Replies(
        run=run,
        texts=texts,
        predictions=[task.prediction(text) for text in texts],
        seconds=seconds,
        prompt_tokens=sum(completion.prompt_tokens for completion in completions),
        new_tokens=sum(len(completion.token_ids) for completion in completions),
        documents_cut=sum(prompter.cut(sample.text) != sample.text for sample in inputs.test),
    )
