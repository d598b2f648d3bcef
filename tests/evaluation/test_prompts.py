"""Prompts hold what the yaml says: documents cut by tokens, examples drawn by seed, the same prompt for training."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from evaluation.config import Prompt
from evaluation.prompts import Prompter, draw_examples
from evaluation.samples import Sample
from llama2.text.tokenizer import load_tokenizer
from tests.handler.support import byte_tokenizer

TRAIN = [Sample(text=f"text {i}", target="abbcccccc"[i % 9]) for i in range(90)]


@pytest.fixture
def prompter(tmp_path: Path):
    byte_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)

    def make(**prompt) -> Prompter:
        return Prompter(prompt=Prompt(**prompt), labels=("a", "b"), tokenizer=tokenizer)

    return make


def test_examples_are_as_many_of_each_label_as_there_can_be() -> None:
    assert Counter(one.target for one in draw_examples(TRAIN, 6, 0, balanced=True)) == {"a": 2, "b": 2, "c": 2}
    assert sorted(Counter(one.target for one in draw_examples(TRAIN, 4, 0, balanced=True)).values()) == [1, 1, 2]
    assert Counter(one.target for one in draw_examples(TRAIN, 36, 0, balanced=True)) == {"a": 10, "b": 13, "c": 13}


def test_the_seed_alone_decides_which_examples_are_drawn() -> None:
    for balanced in (True, False):
        first = draw_examples(TRAIN, 6, 5, balanced=balanced)
        assert first == draw_examples(TRAIN, 6, 5, balanced=balanced)
        assert first != draw_examples(TRAIN, 6, 6, balanced=balanced)
        assert len({one.text for one in first}) == 6
        assert draw_examples(TRAIN, 0, 5, balanced=balanced) == []


def test_more_examples_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="91 examples cannot be drawn from 90 samples"):
        draw_examples(TRAIN, 91, 0, balanced=True)


def test_documents_are_cut_to_tokens_and_to_whole_characters(prompter) -> None:
    five = prompter(max_text_tokens=5)
    assert five.cut("abcde") == "abcde"
    assert five.cut("abcdef") == "abcde"
    assert five.cut("abcdé") == "abcd"  # é is two tokens here
    assert five.dialog("abcdefgh")[-1]["content"] == "abcde"


def test_an_example_looks_as_the_sample_does(prompter) -> None:
    examples = [Sample(text="x y", target="a"), Sample(text="z {labels}", target="b")]
    chat = prompter(instruction="One of {labels}.", template="Text: {text}")
    assert chat.dialog("q", examples) == [
        {"role": "system", "content": "One of a, b."},
        {"role": "user", "content": "Text: x y"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Text: z {labels}"},  # a document's braces are its own
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Text: q"},
    ]
    completion = prompter(instruction="One of {labels}.", template="Text: {text}\nLabel:", format="completion")
    assert completion.completion("q", examples) == (
        "One of a, b.\n\nText: x y\nLabel: a\n\nText: z {labels}\nLabel: b\n\nText: q\nLabel:"
    )


def test_training_has_the_prompt_without_examples(prompter) -> None:
    sample = Sample(text="x", target="a")
    chat, completion = prompter(), prompter(format="completion", template="{text} ->")
    assert chat.training_line(sample) == {"messages": [*chat.dialog("x"), {"role": "assistant", "content": "a"}]}
    assert completion.training_line(sample) == {"prompt": "x ->", "completion": " a"}
