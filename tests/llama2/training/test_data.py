"""A file of samples becomes ids and what is learned of them, or an error with the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama2.text.chat import encode_dialog
from llama2.text.tokenizer import Tokenizer
from llama2.training.batches import batches_in_order, epoch_rows, pack, steps_of
from llama2.training.data import Sample, Samples, read_samples, split
from tests.support.training import options

QUESTION = {"prompt": "Who are you?", "completion": " A king."}
DIALOG = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "A king."},
    {"role": "user", "content": "And she?"},
    {"role": "assistant", "content": "The wisest."},
]


def write(folder: Path, *rows: Any, name: str = "samples.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, tokenizer: Tokenizer, **changes: Any) -> Samples:
    return read_samples(path, tokenizer, options(**changes))


def learned(sample: Sample, tokenizer: Tokenizer) -> str:
    return tokenizer.decode([token for token, counts in zip(sample.ids, sample.counts, strict=True) if counts])


@pytest.mark.parametrize("kind", ["sp", "bpe"])
def test_a_prompt_is_encoded_as_it_is_served_and_its_completion_is_learned(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    (sample,) = read(write(tmp_path, QUESTION), tokenizer).samples
    prompt = tokenizer.encode_prompt(QUESTION["prompt"])
    assert list(sample.ids[: len(prompt)]) == prompt
    assert sample.counts == (False,) * len(prompt) + (True,) * (len(sample) - len(prompt))
    assert sample.ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(sample.ids) == "Who are you? A king."
    (whole,) = read(write(tmp_path, QUESTION), tokenizer, completion_only=False).samples
    assert whole.counts == (False, *[True] * (len(sample) - 1))


@pytest.mark.parametrize("kind", ["sp", "bpe"])
def test_of_a_dialog_the_assistants_turns_are_learned(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    (sample,) = read(write(tmp_path, {"messages": DIALOG}), tokenizer, max_length=256).samples
    # What the server has as a prompt, and nothing of it, is before what is learned.
    for turn in (2, 4):
        prompt = encode_dialog(tokenizer, DIALOG[:turn])
        assert list(sample.ids[: len(prompt)]) == prompt
        assert sample.counts[len(prompt) - 1 : len(prompt) + 1] == (False, True)
    assert learned(sample, tokenizer).replace(" ", "") == "Aking.Thewisest."
    ends = [place for place, token in enumerate(sample.ids) if token in tokenizer.eos_ids and sample.counts[place]]
    assert len(ends) == 2
    assert ends[-1] == len(sample) - 1


def test_columns_of_a_csv_file_are_chosen(tmp_path: Path, sp: Tokenizer) -> None:
    path = write(tmp_path, "id,text,label", '1,"What, who?", Rome.', name="samples.csv")
    (sample,) = read(path, sp, prompt_column="text", completion_column="label").samples
    assert sp.decode(sample.ids) == "What, who? Rome."


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "there is no sample in it"),
        ([""], "there is no sample in it"),
        ([QUESTION, "{"], "line 2: is no JSON"),
        ([QUESTION, "[]"], r"line 2: must be a JSON object, got \[\]"),
        ([{"prompt": "x"}], r"line 1: must have the keys prompt and completion, or messages.*got \['prompt'\]"),
        ([{**QUESTION, "label": "x"}], "line 1: must have the keys"),
        ([{**QUESTION, "completion": 3}], "line 1: completion must be a text, got 3"),
        ([{**QUESTION, "completion": ""}], "line 1: completion must not be empty"),
        ([{**QUESTION, "completion": "\ud800"}], "line 1: text is not valid Unicode"),
        ([{"messages": []}], r"line 1: messages must be a list of messages, got \[\]"),
        ([{"messages": DIALOG[:2]}], r"line 1: messages\[1\].role must be 'assistant' in the last message"),
        ([{"messages": [{"role": "assistant"}]}], r"line 1: messages"),
        ([{"messages": ["hello"]}], r"line 1: messages\[0\].role must be 'assistant'"),
    ],
)
def test_a_bad_line_is_named(rows: list[Any], message: str, tmp_path: Path, sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(write(tmp_path, *rows), sp)
    assert str(tmp_path / "samples.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "there is no sample in it"),
        (["prompt,completion"], "there is no sample in it"),
        (["text,label", "a,b"], "prompt_column 'prompt' is none of its columns: text, label"),
        (["prompt,label", "a,b"], "completion_column 'completion' is none of its columns"),
        (["prompt,completion", "a,b", "a"], "line 3: must have 2 columns as the header has, got 1"),
        (["prompt,completion", "a,b,c"], "line 2: must have 2 columns as the header has, got 3"),
        (["prompt,completion", 'a,"b'], "line 2: is no CSV: unexpected end of data"),
    ],
)
def test_a_bad_line_of_a_csv_file_is_named(lines: list[str], message: str, tmp_path: Path, sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, *lines, name="samples.csv"), sp)


def test_files_of_other_kinds_and_missing_ones_are_refused(tmp_path: Path, sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"must be JSONL or CSV"):
        read(write(tmp_path, name="samples.parquet"), sp)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read(tmp_path / "none.jsonl", sp)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not in UTF-8"):
        read(tmp_path / "binary.jsonl", sp)


def test_longer_samples_are_cut_skipped_or_refused(tmp_path: Path, sp: Tokenizer) -> None:
    path = write(tmp_path, QUESTION, {**QUESTION, "prompt": "What is the recipe of mayonnaise? " * 9})
    whole = read(path, sp, max_length=512).samples[1]
    cut = read(path, sp, max_length=32)
    assert (len(cut.samples[1]), cut.num_cut) == (32, 1)
    assert cut.samples[1].ids == (sp.bos_id, *whole.ids[-31:])
    assert cut.samples[1].num_targets == whole.num_targets
    skipped = read(path, sp, max_length=32, long_samples="skip")
    assert (len(skipped.samples), skipped.num_skipped) == (1, 1)
    with pytest.raises(ValueError, match=rf"line 2: the sample has {len(whole)} tokens, more than max_length=32"):
        read(path, sp, max_length=32, long_samples="refuse")
    with pytest.raises(ValueError, match="every sample is longer than max_length"):
        read(path, sp, max_length=4, long_samples="skip")


def test_a_split_follows_from_the_seed() -> None:
    samples = [Sample(ids=(1, index), counts=(False, True)) for index in range(50)]
    training, validation = split(samples, 0.1, seed=3)
    assert len(validation) == 5
    assert sorted(sample.ids for sample in training + validation) == [sample.ids for sample in samples]
    assert split(samples, 0.1, seed=3) == (training, validation)
    assert split(samples, 0.1, seed=4)[1] != validation
    assert split(samples, 0, seed=3) == (samples, [])
    with pytest.raises(ValueError, match="validation_fraction leaves none of 1 samples"):
        split(samples[:1], 0.5, seed=3)


def test_each_epoch_has_every_sample_once_in_another_order() -> None:
    lengths = [1 + index * 7 % 60 for index in range(200)]
    orders = []
    for epoch in range(2):
        rows = epoch_rows(lengths, epoch, seed=0, row_length=64)
        assert rows == epoch_rows(lengths, epoch, seed=0, row_length=64)
        steps = steps_of(rows, batch_size=4, gradient_accumulation=2)
        batches = [batch for step in steps for batch in step]
        orders.append([index for batch in batches for index in batch])
        assert sorted(orders[-1]) == list(range(200))
        assert max(sum(lengths[index] for index in batch) for batch in batches) <= 4 * 64
        # Packed tightly: all but the last rows are nearly full.
        assert len(batches) <= 1 + sum(lengths) / (4 * 64 * 0.9)
        assert {len(step) for step in steps[:-1]} == {2}
    assert orders[0] != orders[1]
    unpacked = epoch_rows(lengths, 0, seed=0, row_length=None)
    assert {len(batch) for step in steps_of(unpacked, batch_size=4, gradient_accumulation=2) for batch in step} == {4}


def test_rows_never_hold_more_than_their_length() -> None:
    assert pack([5, 5, 5], [0, 1, 2], 10) == [[0, 1], [2]]
    assert pack([10, 3, 7], [0, 1, 2], 10) == [[0], [1, 2]]
    assert batches_in_order([5, 6, 9, 1], row_length=10, batch_size=1) == [[0], [1], [2, 3]]
