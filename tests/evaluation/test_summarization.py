"""ROUGE is what rouge-score says, with its stemmer."""

from __future__ import annotations

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from evaluation.summarization import Summarization

TARGETS = ["The cats were sitting on the mat", "a library for reading files", "nothing alike"]
REPLIES = ["A cat sits on a mat", "library that reads a file", ""]


def test_scores_are_the_means_of_rouge_score_with_stemmer() -> None:
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    each = [scorer.score(target, reply) for target, reply in zip(TARGETS, REPLIES, strict=True)]
    scores = Summarization().measure(TARGETS, REPLIES)(np.arange(3))
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
        assert scores[name] == pytest.approx(sum(one[key].fmeasure for one in each) / 3)


def test_a_known_case_by_hand() -> None:
    """Stems: cat sat mat against cat mat: 2 of 2 and 2 of 3 words, and no pair of them."""
    scores = Summarization().measure(["cats sat mats"], ["cat mat"])(np.arange(1))
    assert scores == pytest.approx({"rouge_1": 0.8, "rouge_2": 0.0, "rouge_l": 0.8})


def test_white_space_around_a_reply_does_not_count_and_empty_ones_are_counted() -> None:
    assert Summarization().prediction(" a b\n") == "a b"
    assert Summarization().details(["a b", "c"], ["x", ""]) == {
        "empty_replies": 1,
        "mean_words": 0.5,
        "mean_words_of_targets": 1.5,
    }
