"""Owns the way from a user's rows to ids, and to which of them are learned: prompts and dialogs.

Knows no torch and no model. A sample is wrong for itself: the message names the file and the line.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import InvalidValue, shown
from llama2.rows import read_rows
from llama2.text.chat import encode_dialog
from llama2.text.tokenizer import Tokenizer
from llama2.training.config import TrainingConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """`ids`, and as many flags: whether the loss of predicting that id counts. The first one never does."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_targets(self) -> int:
        return sum(self.counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A file's, in its order, and what became of those that were longer than `max_length`."""

    samples: tuple[Sample, ...]
    num_cut: int = 0
    num_skipped: int = 0


def read_samples(path: Path | str, tokenizer: Tokenizer, config: TrainingConfig) -> Samples:
    """All samples of a file.

    Raises:
        ValueError: the file or a line of it is wrong, or a sample is too long and `long_samples` refuses it.
    """
    samples, cut, skipped = [], 0, 0
    for place, row in _rows(Path(path), config):
        try:
            sample = _encode(row, tokenizer, config)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if len(sample) > config.max_length:
            if config.long_samples == "refuse":
                raise ValueError(
                    f"{place}: the sample has {len(sample)} tokens, more than max_length={config.max_length}: raise "
                    "that, or choose long_samples: cut or skip"
                )
            if config.long_samples == "skip":
                skipped += 1
                continue
            sample, cut = _cut(sample, config.max_length), cut + 1
        samples.append(sample)
    if not samples:
        what = "every sample is longer than max_length" if skipped else "there is no sample in it"
        raise ValueError(f"{path}: {what}")
    return Samples(samples=tuple(samples), num_cut=cut, num_skipped=skipped)


def split(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Those to learn from and, chosen by `seed`, that fraction to validate with, at least one; in their order.

    Raises:
        InvalidValue: none is left to learn from.
    """
    if fraction == 0:
        return list(samples), []
    count = max(1, round(fraction * len(samples)))
    if count >= len(samples):
        raise InvalidValue(
            "validation_fraction", f"leaves none of {len(samples)} samples to learn from, got {fraction}"
        )
    chosen = set(random.Random(f"validation {seed}").sample(range(len(samples)), count))
    return (
        [sample for index, sample in enumerate(samples) if index not in chosen],
        [sample for index, sample in enumerate(samples) if index in chosen],
    )


def _rows(path: Path, config: TrainingConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each sample as an object, with its place for messages. Of a CSV, the two columns that the config names."""
    columns = {"prompt": config.prompt_column, "completion": config.completion_column}
    for line, values in read_rows(path):
        place = f"{path}, line {line}"
        if path.suffix == ".jsonl":
            yield place, values
            continue
        for option, column in columns.items():
            if column not in values:
                raise ValueError(f"{path}: {option}_column {column!r} is none of its columns: {', '.join(values)}")
        yield place, {what: values[column] for what, column in columns.items()}


def _encode(row: Mapping[str, Any], tokenizer: Tokenizer, config: TrainingConfig) -> Sample:
    if set(row) == {"messages"}:
        ids, counts = _encode_dialog(tokenizer, row["messages"])
    elif set(row) == {"prompt", "completion"}:
        for name, value in row.items():
            if not isinstance(value, str):
                raise InvalidValue(name, f"must be a text, got {shown(value)}")
        if not row["completion"]:
            raise InvalidValue("completion", "must not be empty")
        ids, counts = _encode_completion(tokenizer, row["prompt"], row["completion"])
    else:
        raise ValueError(
            f"must have the keys prompt and completion, or messages, and no other, got {shown(sorted(row))}"
        )
    if not config.completion_only:
        counts = [True] * len(ids)
    counts[0] = False
    if not any(counts):
        raise ValueError("there is nothing in it to learn")
    return Sample(ids=tuple(ids), counts=tuple(counts))


def _encode_completion(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
    """The prompt's ids as the server makes them, then the completion's and the end of the text.

    The text as a whole may have a token across the border; a prompt that is served ends there.
    """
    before = tokenizer.encode_prompt(prompt)
    whole = tokenizer.encode_prompt(prompt + completion)
    learned = whole[len(before) :] if whole[: len(before)] == before else tokenizer.encode(completion)
    learned += _end(tokenizer)
    return before + learned, [False] * len(before) + [True] * len(learned)


def _encode_dialog(tokenizer: Tokenizer, messages: Any) -> tuple[list[int], list[bool]]:
    """By the model's chat format: before each of the assistant's turns what the server has as a prompt there."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise InvalidValue("messages", f"must be a list of messages, got {shown(messages)}")
    ids: list[int] = []
    counts: list[bool] = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") != "assistant":
            continue
        before = encode_dialog(tokenizer, messages[:index])
        # What follows a turn shows where it ends.
        after = encode_dialog(tokenizer, [*messages[: index + 1], {"role": "user", "content": "x"}])
        if before[: len(ids)] != ids or after[: len(before)] != before:
            raise ValueError(
                f"messages[{index}]: the model's chat template writes an earlier turn differently once another one "
                "follows: make each turn of the assistant a sample of its own"
            )
        learned = after[len(before) :]
        ends = [place for place, token_id in enumerate(learned) if token_id in tokenizer.eos_ids]
        if not ends:
            raise ValueError("the model's chat format has no token at the end of the assistant's turns")
        learned = learned[: ends[0] + 1]
        counts += [False] * (len(before) - len(ids)) + [True] * len(learned)
        ids = before + learned
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise InvalidValue(f"messages[{len(messages) - 1}].role", "must be 'assistant' in the last message")
    return ids, counts


def _end(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    return sorted(tokenizer.eos_ids)[:1]


def _cut(sample: Sample, length: int) -> Sample:
    """Its end, after its first token: BOS, where the model has one."""
    ids = (sample.ids[0], *sample.ids[len(sample) - length + 1 :])
    return Sample(ids=ids, counts=(False, *sample.counts[len(sample) - length + 1 :]))
