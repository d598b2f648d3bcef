"""Owns the task of writing a summary, and what is measured of it: ROUGE, as the package `rouge-score` computes it.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.intervals import Measure, Rows
from llama2.text.tokenizer import Tokenizer

METRICS = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
MAX_NEW_TOKENS = 64


class Summarization:
    """Any reply is a summary: what the model wrote, without white space around it."""

    primary = "rouge_l"
    balanced = False
    labels: Sequence[str] = ()
    rule = "ROUGE is the F-measure of rouge-score, with its stemmer; the mean over samples."

    def options(self, tokenizer: Tokenizer, *, continues: bool) -> dict[str, Any]:
        return {"max_new_tokens": MAX_NEW_TOKENS}

    def prediction(self, reply: str) -> str | None:
        return reply.strip()

    def measure(self, targets: Sequence[str], predictions: Sequence[str | None]) -> Measure:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(list(METRICS), use_stemmer=True)
        each = [scorer.score(target, said or "") for target, said in zip(targets, predictions, strict=True)]
        columns = {name: np.array([one[key].fmeasure for one in each]) for key, name in METRICS.items()}

        def measure(rows: Rows) -> dict[str, float]:
            return {name: float(np.mean(values[rows])) for name, values in columns.items()}

        return measure

    def details(self, targets: Sequence[str], predictions: Sequence[str | None]) -> dict[str, Any]:
        words = [len((said or "").split()) for said in predictions]
        return {
            "empty_replies": words.count(0),
            "mean_words": sum(words) / len(words),
            "mean_words_of_targets": sum(len(target.split()) for target in targets) / len(targets),
        }
