"""Owns what an evaluation writes into its folder: results.json, report.md, pictures, and the replies of each run.

Knows no model: all of it is said of replies that are there.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results import machine, save
from evaluation.ablation import tuning_seconds
from evaluation.config import Settings
from evaluation.figures import draw_ablation, draw_confusion, draw_scores
from evaluation.inputs import Inputs, describe_file
from evaluation.intervals import Draws, Estimate, bootstrap
from evaluation.runs import Replies
from evaluation.samples import write_jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Of the runs of an evaluation, in order. `points` has the settings of those that an ablation tuned, `ranks` is how
    many processes the model ran on."""

    settings: Settings
    inputs: Inputs
    replies: Sequence[Replies]
    points: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ranks: int = 1

    def write(self) -> str:
        """Write everything, and return the Markdown."""
        folder, task = self.settings.output_dir, self.inputs.task
        folder.mkdir(parents=True, exist_ok=True)
        targets = [sample.target for sample in self.inputs.test]
        measures = {one.run.name: task.measure(targets, one.predictions) for one in self.replies}
        settings = self.settings
        draws = bootstrap(measures, len(targets), resamples=settings.resamples, seed=settings.seed)
        scores = {run: one.estimates(settings.confidence) for run, one in draws.items()}
        differences = self._differences(draws)
        for one in self.replies:
            self._write_replies(one)
        runs = [self._figures(one, targets, scores[one.run.name]) for one in self.replies]
        text = self._markdown(runs, scores, differences)
        (folder / "report.md").write_text(text, encoding="utf-8")
        save(
            folder / "results.json",
            "evaluation",
            _plain(asdict(settings)),
            {
                **self._about(),
                "runs": runs,
                "differences": [
                    {"run": run, "minus": other, "metrics": {name: asdict(one) for name, one in each.items()}}
                    for (run, other), each in differences.items()
                ],
            },
        )
        draw_scores(folder / "scores.png", scores, f"{settings.task}, {len(targets)} samples")
        for run in runs:
            if "confusion_matrix" in run:
                title = f"{run['run']}: {len(targets)} samples"
                draw_confusion(folder / f"confusion-{run['run']}.png", run["confusion_matrix"], task.labels, title)
        if self.points:
            ablated = [(point, scores[run][task.primary]) for run, point in self.points.items()]
            draw_ablation(folder / "ablation.png", ablated, task.primary)
        return text

    def _differences(self, draws: Mapping[str, Draws]) -> dict[tuple[str, str], dict[str, Estimate]]:
        """Each run minus those before it; points of an ablation are compared with the other runs alone."""
        others = [run for run in draws if run not in self.points]
        return {
            (run, other): draws[run].minus(draws[other], self.settings.confidence)
            for place, run in enumerate(draws)
            for other in others[:place]
        }

    def _write_replies(self, one: Replies) -> None:
        rows = (
            {"line": sample.line, "target": sample.target, "prediction": said, "reply": text}
            for sample, said, text in zip(self.inputs.test, one.predictions, one.texts, strict=True)
        )
        write_jsonl(self.settings.output_dir / f"replies-{one.run.name}.jsonl", rows)

    def _figures(self, one: Replies, targets: Sequence[str], scores: Mapping[str, Estimate]) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "run": one.run.name,
            "shots": one.run.shots,
            "metrics": {name: asdict(estimate) for name, estimate in scores.items()},
            "seconds": one.seconds,
            "samples_per_second": len(targets) / one.seconds,
            "prompt_tokens": one.prompt_tokens,
            "new_tokens": one.new_tokens,
            "documents_cut": one.documents_cut,
            "tuning_seconds": tuning_seconds(one.run.adapter) if one.run.adapter else None,
            **self.inputs.task.details(targets, one.predictions),
        }
        if self.settings.price_per_hour is not None:
            hourly = self.settings.price_per_hour / 3600
            figures["dollars"] = one.seconds * hourly
            if figures["tuning_seconds"] is not None:
                figures["tuning_dollars"] = figures["tuning_seconds"] * hourly
        return figures

    def _about(self) -> dict[str, Any]:
        data = self.settings.data
        return {
            "samples": len(self.inputs.test),
            "ranks": self.ranks,
            "rule": self.inputs.task.rule,
            "test": describe_file(data.test),
            "train": describe_file(data.train) if data.train else None,
            "libraries": {name: importlib.metadata.version(name) for name in ("scikit-learn", "rouge-score")},
        }

    def _markdown(
        self,
        runs: Sequence[Mapping[str, Any]],
        scores: Mapping[str, Mapping[str, Estimate]],
        differences: Mapping[tuple[str, str], Mapping[str, Estimate]],
    ) -> str:
        settings, task, there = self.settings, self.inputs.task, machine()
        percent, metrics = f"{settings.confidence:.0%}", list(next(iter(scores.values())))
        cut = max(run["documents_cut"] for run in runs)
        processor = ", ".join(there["gpus"]) or (
            f"{there['cpu']} (family {there['cpu_family']} model {there['cpu_model']}), {there['cores']} cores"
        )
        prompts = "the model's chat format" if settings.prompt.format == "chat" else "bare completions"
        has_examples = any(run["shots"] for run in runs)
        examples = f" Examples are of the train samples, drawn by seed {settings.seed}." if has_examples else ""
        parts = [
            f"# {settings.task.capitalize()}: {settings.checkpoint.name}",
            *([f"{len(runs)} of {len(settings.runs)} runs."] if len(runs) < len(settings.runs) else []),
            f"{len(self.inputs.test)} samples of {settings.data.test.name}, as {prompts}, greedy.{examples} {cut} "
            f"documents were cut to their first {settings.prompt.max_text_tokens} tokens. {task.rule}",
            f"In brackets: {percent} intervals, from {settings.resamples} bootstrap resamples of the samples.",
            _table(
                ["run", *(metric.replace("_", " ") for metric in metrics)],
                [[run, *map(_with_interval, each.values())] for run, each in scores.items()],
            ),
        ]
        if "replies_without_label" in runs[0]:
            none = ", ".join(f"{run['run']} {run['replies_without_label']}" for run in runs)
            parts.append(f"Replies without a label: {none}.")
        if differences:
            parts += [
                f"Differences in {task.primary.replace('_', ' ')} on the same samples, by paired resamples:",
                _table(
                    ["run", "minus", "difference", f"{percent} interval excludes 0"],
                    [
                        [run, other, _with_interval(each[task.primary]), _yes(each[task.primary].excludes_zero)]
                        for (run, other), each in differences.items()
                    ],
                ),
            ]
        ranks = "" if self.ranks == 1 else f", {self.ranks} ranks"
        parts += [f"Time on {processor}{ranks}, without loading:", _times(runs), "![scores](scores.png)"]
        if self.points:
            parts.append("![ablation](ablation.png)")
        parts += [f"![{run['run']}](confusion-{run['run']}.png)" for run in runs if "confusion_matrix" in run]
        return "\n\n".join(parts) + "\n"


def _times(runs: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "seconds": ("seconds", "{:.1f}"),
        "samples_per_second": ("samples/s", "{:.2f}"),
        "prompt_tokens": ("prompt tokens", "{:,}"),
        "new_tokens": ("new tokens", "{:,}"),
        "dollars": ("$", "{:.4f}"),
        "tuning_seconds": ("tuning, seconds", "{:.1f}"),
        "tuning_dollars": ("tuning, $", "{:.4f}"),
    }
    there = {key: each for key, each in columns.items() if any(run.get(key) is not None for run in runs)}
    rows = [
        [run["run"], *("" if run.get(key) is None else form.format(run[key]) for key, (_, form) in there.items())]
        for run in runs
    ]
    return _table(["run", *(name for name, _ in there.values())], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _with_interval(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _plain(value: Any) -> Any:
    """As JSON has it: a path as a text, without the folders that only this machine has."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.name if isinstance(value, Path) else value
