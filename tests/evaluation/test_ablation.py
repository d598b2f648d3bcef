"""What the points of an ablation are tuned with."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from evaluation.ablation import fraction_of, tuning_seconds
from evaluation.runs import highest_rank
from evaluation.samples import Sample

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


def test_room_is_made_for_the_highest_rank_of_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 64, "v_proj": 4}}')
    assert highest_rank(tmp_path) == 64
    (tmp_path / "adapter_config.json").write_text('{"r": null}')
    with pytest.raises(ValueError, match="is no adapter in PEFT's format"):
        highest_rank(tmp_path)
