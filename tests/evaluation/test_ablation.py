"""What the points of an ablation are tuned with, and that each is tuned once and then measured."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from evaluation.ablation import fraction_of, tune_all, tuning_seconds
from evaluation.config import read_settings
from evaluation.inputs import Inputs
from evaluation.samples import Sample
from llama2.adapters.config import AdapterConfig
from tests.evaluation.support import results, run_evaluation, write_config
from tests.handler.support import byte_tokenizer

SAMPLES = [Sample(text=str(index), target="a") for index in range(100)]


def test_a_larger_fraction_holds_a_smaller_one_in_the_same_order() -> None:
    parts = [fraction_of(SAMPLES, fraction, 0) for fraction in (0.001, 0.25, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 25, 50, 100]
    for smaller, larger in itertools.pairwise(parts):
        assert [sample for sample in larger if sample in smaller] == smaller
    assert parts[-1] == SAMPLES
    assert fraction_of(SAMPLES, 0.25, 1) != parts[1]


def test_the_time_of_tuning_is_that_of_the_log_beside_the_adapter(tmp_path: Path) -> None:
    assert tuning_seconds(tmp_path / "adapter") is None
    (tmp_path / "log.csv").write_text("step,loss,seconds\n1,2.5,1.25\n1,,\n2,2.0,1.5\n")
    assert tuning_seconds(tmp_path / "adapter") == 2.75


@pytest.mark.integration
def test_each_point_is_tuned_once_and_measured_as_a_run(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    base = {"max_steps": 1, "validation_fraction": 0, "max_length": 32, "batch_size": 1, "gradient_accumulation": 1}
    (tmp_path / "finetune.yaml").write_text(yaml.safe_dump(base))
    grids = [{"rank": [2, 3], "sample_fraction": [0.5]}]
    changes = {"ablation": {"finetune": str(tmp_path / "finetune.yaml"), "grids": grids}}
    config = write_config(tmp_path, smollm2_checkpoint, runs=[{"name": "zero-shot"}], **changes)
    settings = read_settings(config)
    assert settings.ablation is not None
    tuned = tune_all(settings, settings.ablation, Inputs.read(settings))
    assert [point for _, point in tuned] == [{"rank": 2, "sample_fraction": 0.5}, {"rank": 3, "sample_fraction": 0.5}]
    weights = [run.adapter / "adapter_model.safetensors" for run, _ in tuned if run.adapter]
    assert [AdapterConfig.load(file.parent).highest_rank for file in weights] == [2, 3]
    assert len((tmp_path / "out/ablation/rank=2,sample_fraction=0.5/train.jsonl").read_text().splitlines()) == 2
    times = [file.stat().st_mtime_ns for file in weights]

    figures = results(config)
    assert [file.stat().st_mtime_ns for file in weights] == times
    assert [one["run"] for one in figures["runs"]] == ["zero-shot", *(run.name for run, _ in tuned)]
    assert all(one["tuning_seconds"] > 0 and one["tuning_dollars"] > 0 for one in figures["runs"][1:])
    assert [(one["run"], one["minus"]) for one in figures["differences"]] == [
        (run.name, "zero-shot") for run, _ in tuned
    ]
    assert (tmp_path / "out" / "ablation.png").stat().st_size > 1000

    weights[0].write_bytes(b"damaged")
    done = run_evaluation(config)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: run rank=2,sample_fraction=0.5: adapter cannot be had")


def test_a_failure_of_finetune_is_its_last_line(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / "finetune.yaml").write_text("learning_rat: 1\n")
    changes = {"ablation": {"finetune": str(tmp_path / "finetune.yaml"), "grids": [{"epochs": [2]}]}}
    settings = read_settings(write_config(tmp_path, tmp_path, **changes))
    assert settings.ablation is not None
    with pytest.raises(ValueError, match=r"finetune\.yaml failed: error: .*learning_rat is an unknown key"):
        tune_all(settings, settings.ablation, Inputs.read(settings))
