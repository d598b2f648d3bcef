"""Owns the way from samples to prompts: documents that are cut, examples that are drawn, and the same for training.

Knows the model's tokenizer, and nothing else of it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.config import Prompt
from evaluation.samples import Sample
from llama2.text.tokenizer import Tokenizer

Message = dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompter:
    """Writes prompts. An example looks as a sample does, with its answer behind it: in a chat as an earlier turn, in a
    completion as an earlier paragraph."""

    prompt: Prompt
    labels: Sequence[str]
    tokenizer: Tokenizer

    def cut(self, text: str) -> str:
        """The first `max_text_tokens` tokens of a document."""
        limit = self.prompt.max_text_tokens
        ids = self.tokenizer.encode(text)
        # A character may have been cut in two.
        return text if len(ids) <= limit else self.tokenizer.decode(ids[:limit]).rstrip("\N{REPLACEMENT CHARACTER}")

    def dialog(self, text: str, examples: Sequence[Sample] = ()) -> list[Message]:
        """For a chat: the instruction, if there is one, is the system's."""
        instruction = self.prompt.filled_instruction(self.labels)
        messages = [{"role": "system", "content": instruction}] if instruction else []
        for example in examples:
            messages.append({"role": "user", "content": self._filled(example.text)})
            messages.append({"role": "assistant", "content": example.target})
        return [*messages, {"role": "user", "content": self._filled(text)}]

    def completion(self, text: str, examples: Sequence[Sample] = ()) -> str:
        """For a bare completion: an answer follows after a space."""
        instruction = self.prompt.filled_instruction(self.labels)
        paragraphs = [instruction] if instruction else []
        paragraphs += [f"{self._filled(example.text)} {example.target}" for example in examples]
        return "\n\n".join([*paragraphs, self._filled(text)])

    def training_line(self, sample: Sample) -> dict[str, Any]:
        """A line of what finetune.py reads, with the very prompt that is evaluated without examples."""
        if self.prompt.format == "chat":
            return {"messages": [*self.dialog(sample.text), {"role": "assistant", "content": sample.target}]}
        return {"prompt": self.completion(sample.text), "completion": f" {sample.target}"}

    def _filled(self, text: str) -> str:
        return self.prompt.filled(self.cut(text), self.labels)


def draw_examples(samples: Sequence[Sample], shots: int, seed: int, *, balanced: bool) -> list[Sample]:
    """`shots` samples, drawn by `seed`; `balanced`: as many of each target, or one more.

    Raises:
        ValueError: there are not so many samples.
    """
    if shots > len(samples):
        raise ValueError(f"{shots} examples cannot be drawn from {len(samples)} samples")
    rng = random.Random(seed)
    if not balanced:
        return rng.sample(samples, shots)
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in rng.sample(samples, len(samples)):
        groups[sample.target].append(sample)
    # The first of each target, in random order, then the second ones, until there are enough.
    queue = rng.sample(list(groups.values()), len(groups))
    depth = max(map(len, queue))
    drawn = [group[index] for index in range(depth) for group in queue if index < len(group)][:shots]
    rng.shuffle(drawn)
    return drawn
