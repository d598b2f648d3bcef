"""An evaluation's yaml is read, or refused with the path of the key that is wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.config import Settings, read_settings

ROOT = Path(__file__).parents[2]
LEAST: dict[str, Any] = {
    "checkpoint": "c",
    "output_dir": "out",
    "task": "classification",
    "data": {"test": "test.csv", "train": "train.csv", "target": "label"},
    "runs": [{"name": "zero-shot"}],
}


def read(tmp_path: Path, values: Any) -> Settings:
    path = tmp_path / "evaluation.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_settings(path)


def with_value(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(LEAST)
    *outer, last = path.split(".")
    inner: Any = values
    for key in outer:
        inner = inner[int(key)] if key.isdecimal() else inner.setdefault(key, {})
    inner[last] = value
    return values


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    settings = read(tmp_path, LEAST)
    assert (settings.prompt.format, settings.match, settings.confidence) == ("chat", "text", 0.95)
    assert settings.runs[0].shots == 0
    assert settings.data.text == "text"
    assert settings.label_names is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("task", "translation", "task must be classification or summarization, got 'translation'"),
        ("chekpoint", "c", "chekpoint is an unknown name: did you mean 'checkpoint'?"),
        ("output_dir", None, "output_dir is missing"),
        ("data.test", None, "data.test is missing"),
        ("data.column", "x", "data.column is an unknown name"),
        ("data.limit", 0, "data.limit must be an integer from 1"),
        ("data", "test.csv", "data must map keys to values, got 'test.csv'"),
        ("runs", [], "runs must be a list of one or more runs, got []"),
        ("runs.0.shots", -1, "runs[0].shots must be an integer from 0"),
        ("runs.0.name", "a/b", "runs[0].name must be of letters, digits and _.,=+-"),
        ("runs", [{"name": "a"}, {"name": "a"}], "runs[1].name must be another than runs before have, got 'a'"),
        ("prompt.template", "no document", "prompt.template must have {text} in it"),
        ("prompt.template", "{text} {shots}", "prompt.template may have {labels} and {text}, got {shots}"),
        ("prompt.instruction", "{text}", "prompt.instruction may have {labels}, got {text}"),
        ("prompt.format", "raw", "prompt.format must be chat or completion, got 'raw'"),
        ("labels", ["a"], "labels must be a list of two or more texts"),
        ("labels", {"a": "x", "b": "x"}, "labels must be a list of two or more texts, or map each label"),
        ("match", "fuzzy", "match must be text or grammar, got 'fuzzy'"),
        ("confidence", 95, "confidence must be a number in (0, 1), got 95"),
        ("price_per_hour", "2 $", "price_per_hour must be a number of at least 0, got '2 $'"),
        ("engine", [], "engine must map options of LLM to values, got []"),
        ("ablation", {"finetune": "f.yaml", "grids": []}, "ablation.grids must be a list of grids, got []"),
        ("ablation", {"finetune": "f", "grids": [{"ranks": [1]}]}, "ablation.grids[0].ranks is none of rank, epochs"),
        ("ablation", {"finetune": "f", "grids": [{"rank": 4}]}, "ablation.grids[0].rank must be a list of numbers"),
        ("ablation", {"finetune": "f", "grids": [{"sample_fraction": [2]}]}, "must be of numbers in (0, 1], got [2]"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(tmp_path: Path, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        read(tmp_path, with_value(path, value))
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'evaluation.yaml'}: ")


def test_what_needs_train_samples_says_so(tmp_path: Path) -> None:
    for changed, message in (
        ({}, "labels must be given where there is no data.train"),
        ({"labels": ["a", "b"], "runs": [{"name": "x", "shots": 2}]}, r"runs\[0\]\.shots needs data\.train"),
        ({"labels": ["a", "b"], "ablation": {"finetune": "f", "grids": [{"rank": [1]}]}}, "ablation needs data.train"),
    ):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, {**LEAST, "data": {"test": "t.csv", "target": "label"}, **changed})


def test_a_summary_has_no_labels(tmp_path: Path) -> None:
    for key, value in (("labels", ["a", "b"]), ("match", "grammar")):
        with pytest.raises(ValueError, match=f"{key} is for classification"):
            read(tmp_path, {**LEAST, "task": "summarization", key: value})


def test_the_points_of_grids_are_all_combinations_and_none_twice(tmp_path: Path) -> None:
    grids = [{"rank": [4, 8], "dropout": [0.0, 0.1]}, {"rank": [8], "dropout": [0.1]}, {"sample_fraction": [0.5]}]
    settings = read(tmp_path, with_value("ablation", {"finetune": "f.yaml", "grids": grids}))
    assert settings.ablation is not None
    assert settings.ablation.points() == [
        {"rank": 4, "dropout": 0.0},
        {"rank": 4, "dropout": 0.1},
        {"rank": 8, "dropout": 0.0},
        {"rank": 8, "dropout": 0.1},
        {"sample_fraction": 0.5},
    ]


@pytest.mark.parametrize("name", ["newsgroups", "debian"])
def test_the_configs_of_the_public_data_sets_are_valid(name: str) -> None:
    settings = read_settings(ROOT / "evaluation" / "configs" / f"{name}.yaml")
    tuning = yaml.safe_load((ROOT / "evaluation" / "configs" / f"{name}-finetune.yaml").read_text())
    assert Path(tuning["output_dir"]) / "adapter" == settings.runs[-1].adapter
    assert Path(tuning["checkpoint_dir"]) == settings.checkpoint
