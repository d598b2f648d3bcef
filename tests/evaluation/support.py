"""A small classification of a user's own files, and evaluate.py as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def run_evaluation(config: Path, *flags: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """`ranks`: how many torchrun starts; 0 is without it."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks else []
    command = [sys.executable, *launch, str(ROOT / "evaluate.py"), str(config), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def results(config: Path, *flags: str, folder: str = "out", ranks: int = 0) -> dict[str, Any]:
    done = run_evaluation(config, *flags, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{(config.parent / folder / 'report.md').read_text()}\nwrote {config.parent / folder}\n"
    figures: dict[str, Any] = json.loads((config.parent / folder / "results.json").read_text())["figures"]
    return figures
