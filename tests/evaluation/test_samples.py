"""A user's files are read, or refused with the file, the line and what is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluation.classification import LabelNames
from evaluation.samples import Sample, read_samples


def read(path: Path, content: str | bytes) -> list[Sample]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_samples(path, text="text", target="label")


def test_jsonl_and_csv_say_the_same(tmp_path: Path) -> None:
    expected = [("one, two", "a"), ("three\nfour", "7"), ("five", "b")]
    json_lines = (
        '{"text": "one, two", "label": "a"}\n\n{"text": "three\\nfour", "label": 7}\n{"label": "b", "text": "five"}'
    )
    table = '\ufefftext,other,label\n"one, two",x,a\n"three\nfour",x,7\n\nfive,,b\n'
    as_json, as_csv = read(tmp_path / "a.jsonl", json_lines), read(tmp_path / "a.csv", table)
    assert [(sample.text, sample.target) for sample in as_json] == expected
    assert [(sample.text, sample.target) for sample in as_csv] == expected
    assert [sample.line for sample in as_json] == [1, 3, 4]
    assert [sample.line for sample in as_csv] == [2, 3, 6]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl has no samples: expected lines with the columns 'text' and 'label'"),
        ("a.csv", "text,label\n", "a.csv has no samples: expected lines with the columns 'text' and 'label'"),
        ("a.jsonl", '{"text": "x", "class": "a"}', "a.jsonl, line 1: has no column 'label', but 'text', 'class'"),
        ("a.csv", "text,class\nx,a\n", "a.csv, line 2: has no column 'label', but 'text', 'class'"),
        ("a.csv", "text,label\nx,a\ny\n", "a.csv, line 3: must have 2 columns as the header has, got 1"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n{"text": ', "a.jsonl, line 2: is no JSON: Expecting value"),
        ("a.jsonl", '["x", "a"]', "a.jsonl, line 1: must be a JSON object, got ['x', 'a']"),
        ("a.jsonl", '{"text": "x", "label": null}', "a.jsonl, line 1: column 'label' must be a text, got None"),
        ("a.jsonl", '{"text": " ", "label": "a"}', "a.jsonl, line 1: column 'text' must be a text, got ' '"),
        ("a.csv", 'text,label\n"x,a\n', "is no CSV"),
        ("a.jsonl", b'{"text": "\xff"}', "a.jsonl is not in UTF-8: byte 10"),
        ("a.txt", "x", "a.txt must be JSONL or CSV: the name must end with .jsonl or .csv"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, content)
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv cannot be read: No such file"):
        read_samples(tmp_path / "a.csv", text="text", target="label")


def test_a_label_that_is_none_is_named_with_its_file_and_line() -> None:
    names = LabelNames.of(None, [Sample(text="x", target="hockey"), Sample(text="y", target="space")])
    with pytest.raises(ValueError, match=r"test\.csv, line 3: 'hokey' is none of the 2 labels; did you mean 'hockey'"):
        names.apply(Path("test.csv"), [Sample(text="z", target="hokey", line=3)])
    with pytest.raises(ValueError, match=r"line 4: 'x' is none of the 2 labels; known are hockey, space"):
        names.apply(Path("test.csv"), [Sample(text="z", target="x", line=4)])


def test_labels_may_have_other_names_for_the_model() -> None:
    names = LabelNames.of({"sci.space": "space", "rec.autos": "cars"}, ())
    assert [sample.target for sample in names.apply(Path("x"), [Sample(text="x", target="rec.autos")])] == ["cars"]
