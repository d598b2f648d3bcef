"""Owns the adapters of an ablation: for each point of its grids a yaml, a process of finetune.py, and a run.

Knows of training only the keys of that yaml and the files that it leaves: `adapter/` and `log.csv` in its `output_dir`.
"""

from __future__ import annotations

import csv
import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation.config import Ablation, Run, Settings
from evaluation.inputs import Inputs
from evaluation.prompts import Prompter
from evaluation.samples import Sample, write_jsonl
from llama2.progress import progress
from llama2.text.tokenizer import load_tokenizer

FINETUNE = Path(__file__).resolve().parents[1] / "finetune.py"
# What finetune.py calls it. Which samples there are, is decided here.
KEYS = {"rank": "rank", "epochs": "epochs", "dropout": "dropout"}
ADAPTER_FOLDER, LOG_FILE = "adapter", "log.csv"


def tune_all(settings: Settings, ablation: Ablation, inputs: Inputs) -> list[tuple[Run, Mapping[str, float]]]:
    """Tune an adapter for each point and return its run. One that was tuned before with the same settings and
    data is not again.

    Raises:
        ValueError: the yaml cannot be read, or finetune.py fails; the message has its last line.
    """
    base = _read_yaml(ablation.finetune)
    runs = []
    for point in progress(ablation.points(), desc="ablation", unit="adapter"):
        name = ",".join(f"{key}={value}" for key, value in point.items())
        folder = settings.output_dir / "ablation" / name
        data = folder / "train.jsonl"
        chosen = fraction_of(inputs.train, point.get("sample_fraction", 1.0), settings.seed)
        values = {**base, **{KEYS[key]: value for key, value in point.items() if key in KEYS}}
        values |= {"checkpoint_dir": str(settings.checkpoint), "data": str(data), "output_dir": str(folder / "tuned")}
        lines = training_lines(settings, inputs, chosen)
        _tune(folder, values, data, lines)
        runs.append((Run(name=name, adapter=folder / "tuned" / ADAPTER_FOLDER), point))
    return runs


def training_lines(settings: Settings, inputs: Inputs, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """`samples` as finetune.py reads them, with the prompt of the evaluation."""
    tokenizer = load_tokenizer(settings.checkpoint)
    prompter = Prompter(prompt=settings.prompt, labels=inputs.task.labels, tokenizer=tokenizer)
    return [prompter.training_line(sample) for sample in samples]


def fraction_of(samples: Sequence[Sample], fraction: float, seed: int) -> list[Sample]:
    """That part of the samples, at least one, chosen by `seed`, in their order. A larger part holds a smaller one."""
    order = random.Random(f"fraction {seed}").sample(range(len(samples)), len(samples))
    return [samples[index] for index in sorted(order[: max(1, round(fraction * len(samples)))])]


def tuning_seconds(adapter: Path) -> float | None:
    """The time of the training steps, by the log beside the adapter; None where there is none."""
    log = adapter.parent / LOG_FILE
    if not log.is_file():
        return None
    with log.open(encoding="utf-8", newline="") as lines:
        return sum(float(row["seconds"] or 0) for row in csv.DictReader(lines))


def _tune(folder: Path, values: Mapping[str, Any], data: Path, lines: list[dict[str, Any]]) -> None:
    """One process of finetune.py, which goes on where an interrupted one of the same settings and data was."""
    config, state, output = folder / "finetune.yaml", folder / "state", folder / "finetune.log"
    write_jsonl(data, lines)
    text = yaml.safe_dump(dict(values), sort_keys=True)
    identity = hashlib.sha256(text.encode() + data.read_bytes()).hexdigest()
    before = state.read_text() if state.is_file() else ""
    if before == f"{identity} done":
        return
    command = [sys.executable, str(FINETUNE), str(config)]
    if before == f"{identity} begun":
        command.append("--resume")
    else:
        shutil.rmtree(values["output_dir"], ignore_errors=True)
    config.write_text(text, encoding="utf-8")
    state.write_text(f"{identity} begun")
    with output.open("w", encoding="utf-8") as log:
        failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if failed:
        said = output.read_text(encoding="utf-8").strip().splitlines()
        raise ValueError(f"{FINETUNE.name} {config} failed: {said[-1] if said else f'exit code {failed}'}")
    state.write_text(f"{identity} done")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"ablation.finetune {path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"ablation.finetune {path} must map keys to values")
    return values
