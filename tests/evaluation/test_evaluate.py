"""evaluate.py runs the demo's model on a user's files and writes a report; a mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TOPICS = {
    "music": ["The band played three songs and the singer forgot the words.", "She tunes her violin before a concert."],
    "food": ["Boil the potatoes, then mash them with butter and milk.", "This soup needs more salt and some pepper."],
    "sports": ["The striker scored twice before half time.", "He ran the marathon in under three hours."],
}


def write_config(folder: Path, checkpoint: Path | str, **changes: Any) -> Path:
    rows = [(text, topic) for topic, texts in TOPICS.items() for text in texts]
    for part, of in (("train", rows[::2]), ("test", rows[1::2])):
        lines = [json.dumps({"text": text, "label": topic}) + "\n" for text, topic in of]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    values = {
        "checkpoint": str(checkpoint),
        "output_dir": str(folder / "out"),
        "task": "classification",
        "data": {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "target": "label"},
        "prompt": {
            "format": "completion",
            "instruction": "Topics: {labels}.",
            "template": "{text}\nTopic:",
            "max_text_tokens": 8,
        },
        "runs": [{"name": "zero-shot"}, {"name": "few-shot", "shots": 3}],
        "resamples": 50,
        "price_per_hour": 3.6,
        "engine": {"max_batch_size": 4, "max_seq_len": 512},
        **changes,
    }
    (folder / "evaluation.yaml").write_text(yaml.safe_dump(values))
    return folder / "evaluation.yaml"


def run(config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "evaluate.py"), str(config), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def results(config: Path, *flags: str) -> dict[str, Any]:
    done = run(config, *flags)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads((config.parent / "out" / "results.json").read_text())["figures"]
    return figures


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

    free = results(
        write_config(tmp_path, smollm2_checkpoint, labels=[*TOPICS, "quantum chromodynamics"]), "--runs", "zero-shot"
    )
    assert "after normalisation" in free["rule"]
    (only,) = free["runs"]
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies-zero-shot.jsonl").open()]
    assert only["replies_without_label"] == sum(row["prediction"] is None for row in replies)
    assert only["documents_cut"] > 0


@pytest.mark.integration
def test_summaries_in_a_chat(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    prompt = {"template": "{text}\n\nWhat is this about? Answer in five words."}
    config = write_config(tmp_path, smollm2_checkpoint, task="summarization", prompt=prompt, max_new_tokens=12)
    figures = results(config, "--runs", "few-shot")
    (only,) = figures["runs"]
    assert set(only["metrics"]) == {"rouge_1", "rouge_2", "rouge_l"}
    assert 0 < only["new_tokens"] <= 36
    assert "confusion_matrix" not in only


@pytest.mark.integration
def test_training_data_has_the_prompt_that_is_evaluated(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2_checkpoint)
    done = run(config, "--training_data", str(tmp_path / "tune.jsonl"))
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "tune.jsonl").read_text().splitlines()[0])
    start = "Topics: food, music, sports.\n\nThe band played three songs"
    assert first["prompt"].startswith(start)
    assert first["prompt"].endswith("\nTopic:")
    assert first["completion"] == " music"


@pytest.mark.integration
def test_a_prompt_that_does_not_fit_is_named_with_its_run(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, smollm2_checkpoint, engine={"max_seq_len": 64, "max_batch_size": 4})
    done = run(config, "--runs", "few-shot")
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
            "run tuned: there is no adapter in nowhere; other runs: --runs NAME,NAME",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, changes: dict[str, Any], flags: list[str], message: str) -> None:
    done = run(write_config(tmp_path, "nowhere", **changes), *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
