"""Labels are found in replies by the rule that the report states, and metrics are scikit-learn's."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from evaluation.classification import Classification, normalised

LABELS = ("cars", "sci.space", "baseball bat", "bat")


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("cars", "cars"),
        (" Cars.\n", "cars"),
        ("**SCI-Space**", "sci.space"),
        ("The topic is sci.space.", "sci.space"),
        ("ｃａｒｓ", "cars"),
        ("A baseball bat!", "baseball bat"),
        ("a bat", "bat"),
        ("cars, or a bat", None),
        ("carse", None),
        ("science", None),
        ("", None),
    ],
)
def test_a_label_is_found_after_normalisation_if_it_is_the_only_one(reply: str, label: str | None) -> None:
    assert Classification(LABELS, "text").prediction(reply) == label


def test_labels_that_normalisation_does_not_tell_apart_are_refused() -> None:
    assert normalised("Sci.Space") == "sci space"
    with pytest.raises(ValueError, match="'Sci-Space' is 'sci space' after normalisation, as 'sci space' is"):
        Classification(("sci space", "Sci-Space"), "text")
    with pytest.raises(ValueError, match=r"'\.\.\.'"):
        Classification(("a", "..."), "text")


def test_metrics_are_those_of_scikit_learn_and_no_label_is_a_miss() -> None:
    rng = random.Random(1)
    truth = [rng.choice(LABELS) for _ in range(60)]
    said = [rng.choice((*LABELS, None, label, label, label)) for label in truth]
    scores = Classification(LABELS, "text").measure(truth, said)(np.arange(60))
    texts = [label or "none" for label in said]
    for average in ("macro", "micro"):
        for name, function in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
            expected = function(truth, texts, labels=LABELS, average=average)
            assert scores[f"{average}_{name}"] == pytest.approx(expected)
    assert scores["accuracy"] == pytest.approx(accuracy_score(truth, texts))
    assert scores["micro_recall"] == pytest.approx(scores["accuracy"])
    assert scores["micro_precision"] > scores["micro_recall"]  # some replies had no label


def test_a_known_case_by_hand() -> None:
    task = Classification(("a", "b"), "grammar")
    truth, said = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    scores = task.measure(truth, said)(np.arange(4))
    assert scores["accuracy"] == scores["micro_f1"] == 0.75
    assert scores["macro_precision"] == pytest.approx((1 + 1 / 2) / 2)
    assert scores["macro_recall"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    details = task.details([*truth, "b"], [*said, None])
    assert details["confusion_matrix"] == [[2, 1, 0], [0, 1, 1]]
    assert details["replies_without_label"] == 1
    assert details["labels"]["a"] == pytest.approx({"precision": 1, "recall": 2 / 3, "f1": 0.8, "samples": 3})


def test_metrics_of_a_draw_are_those_of_its_rows() -> None:
    task = Classification(("a", "b"), "grammar")
    measure = task.measure(["a", "b", "a"], ["a", "a", "b"])
    assert measure(np.array([0, 0, 1])) == task.measure(["a", "a", "b"], ["a", "a", "a"])(np.arange(3))
