"""Owns what all runs of an evaluation share: its task, its samples, and the labels as the model is to write them.

Knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evaluation.classification import Classification, LabelNames
from evaluation.config import Settings
from evaluation.intervals import Measure
from evaluation.samples import Sample, read_samples
from evaluation.summarization import Summarization
from llama2.text.tokenizer import Tokenizer


class Task(Protocol):
    """What is asked of a model. `primary` is the metric that runs are compared by, `balanced` whether examples are
    drawn evenly over targets, `rule` how a reply is read, in words."""

    primary: str
    balanced: bool
    rule: str
    labels: Sequence[str]

    def options(self, tokenizer: Tokenizer, *, continues: bool) -> dict[str, Any]: ...

    def prediction(self, reply: str) -> str | None: ...

    def measure(self, targets: Sequence[str], predictions: Sequence[str | None]) -> Measure: ...

    def details(self, targets: Sequence[str], predictions: Sequence[str | None]) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The samples' targets are what the model is to write."""

    task: Task
    train: Sequence[Sample]
    test: Sequence[Sample]

    @classmethod
    def read(cls, settings: Settings) -> Inputs:
        """
        Raises:
            ValueError: a file or a label in it is wrong; the message names file and line.
        """
        data = settings.data
        train = [] if data.train is None else read_samples(data.train, text=data.text, target=data.target)
        test = read_samples(data.test, text=data.text, target=data.target)[: data.limit]
        if settings.task == "summarization":
            return cls(task=Summarization(), train=train, test=test)
        names = LabelNames.of(settings.label_names, train)
        task = Classification([*names.names.values()], settings.match)
        if data.train is not None:
            train = names.apply(data.train, train)
        test = names.apply(data.test, test)
        return cls(task=task, train=train, test=test)


def describe_file(path: Path) -> dict[str, Any]:
    """Its name and its sha256, for a report."""
    return {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
