"""Measures a model on a user's own samples: classification or summarization, zero-shot, few-shot and tuned.

    python evaluate.py CONFIG.yaml
    python evaluate.py CONFIG.yaml --runs zero-shot,few-shot
    python evaluate.py CONFIG.yaml --training_data train.jsonl

The last one runs nothing: it writes the train samples as finetune.py reads them, with the prompt of the evaluation.
docs/evaluation.md has the keys of the yaml.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.ablation import training_lines, tune_all
from evaluation.config import Ablation, Run, Settings, read_settings
from evaluation.inputs import Inputs
from evaluation.report import Report
from evaluation.runs import run_all
from evaluation.samples import write_jsonl
from llama2.adapters.reference import AdapterRef
from llama2.errors import InvalidValue
from llama2.parallel.torchrun import exit_with, read_arguments


def evaluate(settings: Settings, inputs: Inputs, runs: Sequence[Run], ablation: Ablation | None) -> str:
    """Make the runs and those of the ablation, write the report, and return its Markdown; under torchrun rank 0 writes.

    Raises:
        ValueError: a setting, a folder or a prompt is wrong.
    """
    points = {}
    if ablation is not None:
        if "RANK" in os.environ:
            raise ValueError("an ablation starts processes of its own: run it without torchrun")
        tuned = tune_all(settings, ablation, inputs)
        points = {run.name: point for run, point in tuned}
        runs = [*runs, *(run for run, _ in tuned)]
    replies = list(run_all(settings, runs, inputs))
    if os.environ.get("RANK", "0") != "0":
        return ""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Report(settings=settings, inputs=inputs, replies=replies, points=points, ranks=ranks).write()


def chosen_runs(settings: Settings, names: str | None) -> list[Run]:
    """The runs with these names, separated by commas; all of them where there are none.

    Raises:
        ValueError: there is no such run, or its adapter is not there.
    """
    runs = {run.name: run for run in settings.runs}
    for name in names.split(",") if names else ():
        if name not in runs:
            raise ValueError(f"--runs {name}: there is no such run, but {', '.join(runs)}")
    chosen = [runs[name] for name in (names.split(",") if names else runs)]
    for run in chosen:
        try:
            if run.adapter is not None:
                AdapterRef.of(run.adapter)
        except InvalidValue as error:
            raise ValueError(f"run {run.name}: {error}; other runs: --runs NAME,NAME") from None
    return chosen


def main() -> None:
    known = argparse.ArgumentParser(prog="evaluate.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    known.add_argument("config", type=Path, help="the yaml of the evaluation")
    known.add_argument(
        "--runs", help="names of the runs to make, separated by commas; by default all, and the ablation"
    )
    known.add_argument("--training_data", type=Path, help="write the train samples there, for finetune.py, and end")
    given = read_arguments(known)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        settings = read_settings(given.config)
        inputs = Inputs.read(settings)
        if given.training_data is not None:
            if settings.data.train is None:
                raise ValueError(f"{given.config}: data.train is missing: it has the samples to train with")
            write_jsonl(given.training_data, training_lines(settings, inputs, inputs.train))
            print(f"wrote {len(inputs.train)} samples to {given.training_data}")
            return
        runs, ablation = chosen_runs(settings, given.runs), settings.ablation
        if given.runs:
            # The report of all runs stays as it is.
            settings, ablation = replace(settings, output_dir=settings.output_dir / f"runs-{given.runs}"), None
        text = evaluate(settings, inputs, runs, ablation)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        exit_with(1)
    except KeyboardInterrupt:
        sys.exit("\nstopped: nothing is written before all runs are made")
    if text:
        print(text)
        print(f"wrote {settings.output_dir}")


if __name__ == "__main__":
    main()
