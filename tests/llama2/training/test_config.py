"""A run's options are declared once, and a wrong one is named; docs/finetuning.md lists them all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llama2.training.config import PRESETS, TrainingConfig
from llama2.training.optimizer import learning_rate
from tests.support.training import options

PAGE = (Path(__file__).parents[3] / "docs" / "finetuning.md").read_text(encoding="utf-8")


def shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def test_the_page_has_every_option_with_its_default_and_help() -> None:
    section = PAGE.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    expected = [
        [f"`{one.name}`", shown(one.default), one.metadata["help"]] for one in dataclasses.fields(TrainingConfig)
    ]
    assert rows == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rat": 1e-4}, "learning_rat is an unknown key: did you mean 'learning_rate'"),
        ({"preset": "seed"}, "preset must be all-linear or seed001, got 'seed'"),
        ({"rank": 0}, "rank must be a positive integer, got 0"),
        ({"rank": True}, "rank must be a positive integer, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be a number above 0, got 'fast'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"packing": "yes"}, "packing must be true or false, got 'yes'"),
        ({"schedule": "step"}, "schedule must be constant, linear or cosine, got 'step'"),
        ({"long_samples": None}, "long_samples must be cut, skip or refuse, got None"),
        ({"dtype": "fp16"}, "dtype must be bfloat16 or float32"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_steps": 0}, "max_steps must be a positive integer, or nothing, got 0"),
        ({"data": None}, "data must be a text, got None"),
        ({"early_stopping": 3, "validation_fraction": 0}, "early_stopping needs validation_data or"),
        ({"target_modules": [1]}, r"target_modules must be all-linear or a list of names, got \(1,\)"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        options(**values)


def test_a_preset_is_what_the_file_does_not_say(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "checkpoint_dir: a\ndata: b.jsonl\noutput_dir: c\npreset: seed001\nrank: 64\nepochs: 1\n"
    )
    config = TrainingConfig.load(tmp_path / "run.yaml")
    assert (config.rank, config.epochs, config.alpha, config.target_modules) == (64, 1, 16, ("q_proj", "v_proj"))
    assert (config.learning_rate, config.schedule, config.warmup) == (2e-4, "constant", 0.03)
    assert (config.batch_size, config.gradient_accumulation, config.max_gradient_norm) == (4, 2, 0.3)
    assert config.max_length == 512
    assert TrainingConfig.of({**PRESETS["seed001"], "checkpoint_dir": "a", "data": "b", "output_dir": "c"}).rank == 8


@pytest.mark.parametrize("text", ["", "- a", "data: [", "checkpoint_dir: a\ndata: b\noutput_dir: c\nrank: 0\n"])
def test_a_wrong_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path / "run.yaml")):
        TrainingConfig.load(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read"):
        TrainingConfig.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_rises_and_falls(schedule: str) -> None:
    config = options(schedule=schedule, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(1, 102)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx({"constant": 1.0, "linear": 0.5, "cosine": 0.5}[schedule])
    assert rates[100] == pytest.approx({"constant": 1.0, "linear": 0.0, "cosine": 0.0}[schedule])
    assert learning_rate(options(warmup=0), 1, 3) == 2e-4


def test_a_number_may_be_written_as_yaml_1_2_has_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("{checkpoint_dir: a, data: b, output_dir: c, learning_rate: 2e-4}")
    assert TrainingConfig.load(file).learning_rate == 2e-4


def test_a_wrong_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"target_modules must be of q_proj, .*, got 'vproj'"):
        TrainingConfig.of(
            {"checkpoint_dir": "a", "data": "b", "output_dir": "c", "target_modules": ["q_proj", "vproj"]}
        )
