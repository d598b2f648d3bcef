"""evaluate.py runs the demo's model on a user's files and writes a report; a mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.support import TOPICS, results, run_evaluation, write_config


@pytest.mark.integration
def test_labels_with_a_grammar_and_without(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    figures = results(write_config(tmp_path, smollm2_checkpoint, match="grammar"))
    assert [one["run"] for one in figures["runs"]] == ["zero-shot", "few-shot"]
    for one in figures["runs"]:
        assert one["replies_without_label"] == 0
        assert sum(map(sum, one["confusion_matrix"])) == 3
        assert one["dollars"] == pytest.approx(one["seconds"] / 1000)
        assert one["metrics"]["macro_f1"]["low"] <= one["metrics"]["macro_f1"]["high"]
        rows = [json.loads(line) for line in (tmp_path / "out" / f"replies-{one['run']}.jsonl").open()]
        assert {row["reply"].strip() for row in rows} <= TOPICS.keys()
        assert [row["target"] for row in rows] == list(TOPICS)
        assert (tmp_path / "out" / f"confusion-{one['run']}.png").stat().st_size > 1000
    assert figures["runs"][1]["prompt_tokens"] > 2 * figures["runs"][0]["prompt_tokens"]
    (difference,) = figures["differences"]
    assert (difference["run"], difference["minus"]) == ("few-shot", "zero-shot")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Each reply was held to the set of labels by a grammar." in text

    config = write_config(tmp_path, smollm2_checkpoint, labels=[*TOPICS, "quantum chromodynamics"])
    free = results(config, "--runs", "zero-shot", folder="out/runs-zero-shot")
    assert "after normalisation" in free["rule"]
    assert (tmp_path / "out" / "report.md").read_text() == text
    assert "1 of 2 runs." in (tmp_path / "out" / "runs-zero-shot" / "report.md").read_text()
    (only,) = free["runs"]
    replies = [json.loads(line) for line in (tmp_path / "out" / "runs-zero-shot" / "replies-zero-shot.jsonl").open()]
    assert only["replies_without_label"] == sum(row["prediction"] is None for row in replies)
    assert only["documents_cut"] > 0


@pytest.mark.integration
def test_summaries_in_a_chat(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    prompt = {"template": "{text}\n\nWhat is this about? Answer in five words."}
    config = write_config(tmp_path, smollm2_checkpoint, task="summarization", prompt=prompt, max_new_tokens=12)
    figures = results(config, "--runs", "few-shot", folder="out/runs-few-shot")
    (only,) = figures["runs"]
    assert set(only["metrics"]) == {"rouge_1", "rouge_2", "rouge_l"}
    assert 0 < only["new_tokens"] <= 36
    assert "confusion_matrix" not in only


@pytest.mark.integration
def test_two_ranks_have_the_report_of_one(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    engine = {"max_batch_size": 4, "max_seq_len": 512, "dtype": "float32"}
    alone, together = (
        results(
            write_config(tmp_path, smollm2_checkpoint, engine=engine, match="grammar", output_dir=str(tmp_path / name)),
            folder=name,
            ranks=ranks,
        )
        for name, ranks in (("one", 0), ("two", 2))
    )
    assert (alone.pop("ranks"), together.pop("ranks")) == (1, 2)
    for figures in (alone, together):
        for run in figures["runs"]:
            for name in ("seconds", "samples_per_second", "dollars"):
                assert run.pop(name) > 0
    assert alone == together
    for run in ("zero-shot", "few-shot"):
        texts = [(tmp_path / name / f"replies-{run}.jsonl").read_text() for name in ("one", "two")]
        assert texts[0] == texts[1]
    assert ", 2 ranks, without loading" in (tmp_path / "two" / "report.md").read_text()


@pytest.mark.integration
def test_a_mistake_is_one_line_under_torchrun(tmp_path: Path) -> None:
    done = run_evaluation(write_config(tmp_path, "nowhere"), "--runs", "tuned", ranks=2)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith("error: --runs tuned: there is no such run, but zero-shot")
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr


@pytest.mark.integration
def test_training_data_has_the_prompt_that_is_evaluated(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2_checkpoint)
    done = run_evaluation(config, "--training_data", str(tmp_path / "tune.jsonl"))
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "tune.jsonl").read_text().splitlines()[0])
    start = "Topics: food, music, sports.\n\nThe band played three songs"
    assert first["prompt"].startswith(start)
    assert first["prompt"].endswith("\nTopic:")
    assert first["completion"] == " music"


@pytest.mark.integration
def test_a_prompt_that_does_not_fit_is_named_with_its_run(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2_checkpoint, engine={"max_seq_len": 64, "max_batch_size": 4})
    done = run_evaluation(config, "--runs", "few-shot")
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: run few-shot: prompts[")
    assert "lower shots, of 3, or max_text_tokens" in error


@pytest.mark.parametrize(
    ("changes", "flags", "message"),
    [
        ({"labels": ["music", "food"]}, [], "train.jsonl, line 3: 'sports' is none of the 2 labels"),
        ({"labels": ["a", "A"]}, [], "label 'A' is 'a' after normalisation"),
        ({}, ["--runs", "tuned"], "--runs tuned: there is no such run, but zero-shot, few-shot"),
        (
            {"runs": [{"name": "tuned", "adapter": "nowhere"}]},
            [],
            "run tuned: adapter must be a folder with adapter_config.json and adapter_model.safetensors, as PEFT "
            "writes it, got 'nowhere', which does not exist; other runs: --runs NAME,NAME",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], flags: list[str], message: str) -> None:
    done = run_evaluation(write_config(tmp_path, "nowhere", **changes), *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
