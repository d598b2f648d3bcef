"""Owns the task of choosing a label: how a reply becomes one, and what is measured of it (scikit-learn's metrics).

Knows no model. A reply is held to the labels by a grammar, or a label is looked for in what the model wrote.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.intervals import Measure, Rows
from evaluation.samples import Sample
from llama2.errors import shown
from llama2.names import nearest
from llama2.text.tokenizer import Tokenizer

# Beyond what the longest label needs: a reply may begin with a word or two before it.
SPARE_TOKENS = 8
RULES = {
    "grammar": "Each reply was held to the set of labels by a grammar.",
    "text": (
        "A reply counts as a label if it equals it after normalisation (NFKC, lower case, only letters and digits), or "
        "if that label alone occurs in it as whole words; any other reply counts as none."
    ),
}


class Classification:
    """`labels` are what the model is to write."""

    primary = "macro_f1"
    balanced = True

    def __init__(self, labels: Sequence[str], match: str) -> None:
        """
        Raises:
            ValueError: two labels are the same after normalisation.
        """
        self.labels: Sequence[str] = tuple(labels)
        self.rule = RULES[match]
        self._match = match
        self._known: dict[str, str] = {}
        for label in labels:
            other = self._known.setdefault(normalised(label), label)
            if other != label or not normalised(label):
                raise ValueError(f"label {label!r} is {normalised(label)!r} after normalisation, as {other!r} is")

    def options(self, tokenizer: Tokenizer, *, continues: bool) -> dict[str, Any]:
        """What `LLM` is told beside the prompts. `continues`: a reply follows its prompt after a space."""
        written = [f" {label}" if continues else label for label in self.labels]
        longest = max(len(tokenizer.encode(label)) for label in written)
        if self._match == "grammar":
            return {"choice": written, "max_new_tokens": longest + SPARE_TOKENS}
        return {"max_new_tokens": longest + SPARE_TOKENS}

    def prediction(self, reply: str) -> str | None:
        """The label that a reply counts as, by `rule`."""
        words = normalised(reply)
        if words in self._known:
            return self._known[words]
        found = [known for known in self._known if f" {known} " in f" {words} "]
        # "baseball bat" is no "bat".
        whole = [one for one in found if not any(one != other and f" {one} " in f" {other} " for other in found)]
        return self._known[whole[0]] if len(whole) == 1 else None

    def measure(self, targets: Sequence[str], predictions: Sequence[str | None]) -> Measure:
        """Accuracy, and precision, recall and F1: macro, the mean over labels, and micro, over all samples, where a
        reply without a label lowers recall alone."""
        from sklearn.metrics import precision_recall_fscore_support

        truth, said = self._codes(targets), self._codes(predictions)
        codes = range(len(self.labels))

        def measure(rows: Rows) -> dict[str, float]:
            scores = {"accuracy": float(np.mean(truth[rows] == said[rows]))}
            for average in ("macro", "micro"):
                precision, recall, f1, _ = precision_recall_fscore_support(
                    truth[rows], said[rows], labels=codes, average=average, zero_division=0
                )
                scores |= {f"{average}_f1": f1, f"{average}_precision": precision, f"{average}_recall": recall}
            return {name: float(value) for name, value in scores.items()}

        return measure

    def details(self, targets: Sequence[str], predictions: Sequence[str | None]) -> dict[str, Any]:
        """The scores of each label, how many replies had none, and the confusion matrix: a row for each label of the
        data, a column for each label said and, last, for none."""
        from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

        truth, said = self._codes(targets), self._codes(predictions)
        codes = range(len(self.labels))
        scores = precision_recall_fscore_support(truth, said, labels=codes, zero_division=0)
        matrix = confusion_matrix(truth, said, labels=[*codes, -1])[:-1]
        return {
            "replies_without_label": int(np.sum(said == -1)),
            "labels": {
                label: dict(zip(("precision", "recall", "f1", "samples"), map(float, row), strict=True))
                for label, row in zip(self.labels, np.transpose(scores), strict=True)
            },
            "confusion_matrix": matrix.tolist(),
        }

    def _codes(self, labels: Sequence[str | None]) -> NDArray[np.int64]:
        """Numbers, which are faster to compare than texts; -1 is none."""
        codes = {label: code for code, label in enumerate(self.labels)}
        return np.array([-1 if label is None else codes[label] for label in labels], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelNames:
    """What the model is to write for each label of the data."""

    names: Mapping[str, str]

    @classmethod
    def of(cls, names: Mapping[str, str] | None, train: Sequence[Sample]) -> LabelNames:
        """`names`, or the labels of `train` as they are."""
        return cls(names=names or {label: label for label in sorted({sample.target for sample in train})})

    def apply(self, path: Path, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the names in place of their labels.

        Raises:
            ValueError: a label is unknown; the message names the file and the line.
        """
        for sample in samples:
            if sample.target not in self.names:
                raise ValueError(
                    f"{path}, line {sample.line}: {shown(sample.target)} is none of the {len(self.names)} labels; "
                    f"{nearest(sample.target, self.names)}"
                )
        return [Sample(text=one.text, target=self.names[one.target], line=one.line) for one in samples]


def normalised(text: str) -> str:
    """NFKC, lower case, and one space for whatever is no letter and no digit."""
    return " ".join(re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold()))
