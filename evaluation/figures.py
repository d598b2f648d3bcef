"""Owns the pictures of a report: scores with their intervals, a confusion matrix, an ablation.

Knows no task.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.intervals import Estimate


def draw_scores(path: Path, scores: Mapping[str, Mapping[str, Estimate]], title: str) -> None:
    """A bar for each metric of each run, with its interval."""
    figure = _figure(max(6.0, 1.2 * len(scores) + 4), 4.5)
    axes = figure.subplots()
    metrics = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for place, (run, estimates) in enumerate(scores.items()):
        each = [estimates[metric] for metric in metrics]
        xs = np.arange(len(metrics)) + (place - (len(scores) - 1) / 2) * width
        axes.bar(xs, [one.value for one in each], width, yerr=_bars(each), capsize=2, label=run)
    axes.set_xticks(np.arange(len(metrics)), [metric.replace("_", " ") for metric in metrics], rotation=30, ha="right")
    axes.set_ylim(0, 1)
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_confusion(path: Path, matrix: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> None:
    """A row for each label of the data, a column for each label that was said and, where replies had none, for that."""
    counts = np.array(matrix)
    columns = [*labels, "none"] if counts[:, -1].any() else list(labels)
    counts = counts[:, : len(columns)]
    size = max(4.5, 0.45 * len(columns) + 2.5)
    figure = _figure(size, size)
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    dark = counts.max() / 2
    for (row, column), count in np.ndenumerate(counts):
        if count:
            axes.text(column, row, str(count), ha="center", va="center", color="white" if count > dark else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("said")
    axes.set_ylabel("is")
    axes.set_title(title)
    figure.savefig(path, dpi=120)


def draw_ablation(path: Path, points: Sequence[tuple[Mapping[str, float], Estimate]], metric: str) -> None:
    """A panel for each setting that varies: the metric over its values, a line for points that differ in it alone."""
    panels: dict[str, dict[str, list[tuple[float, Estimate]]]] = defaultdict(lambda: defaultdict(list))
    for point, estimate in points:
        for name, value in point.items():
            others = ", ".join(f"{other}={point[other]}" for other in point if other != name)
            panels[name][others].append((value, estimate))
    # A single point is in the panel of what it differs in. If none varies, all are shown.
    lined = {
        name: kept
        for name, lines in panels.items()
        if (kept := {others: line for others, line in lines.items() if len(line) > 1})
    } or panels
    figure = _figure(4 * len(lined), 4.5)
    panes = figure.subplots(1, len(lined), squeeze=False, sharey=True)[0]
    panes[0].set_ylabel(metric.replace("_", " "))
    for axes, (name, lines) in zip(panes, lined.items(), strict=True):
        for others, line in lines.items():
            line.sort(key=lambda one: one[0])
            each = [estimate for _, estimate in line]
            values = [one.value for one in each]
            axes.errorbar([x for x, _ in line], values, _bars(each), fmt="o-", capsize=3, label=others or "_")
        xs = sorted({x for line in lines.values() for x, _ in line})
        if xs[0] > 0 and xs[-1] >= 10 * xs[0]:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.set_xlabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
        if any(lines):
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _bars(estimates: Sequence[Estimate]) -> np.ndarray:
    """How far an interval reaches below and above its value, which a skewed one may not hold."""
    below = [max(0.0, one.value - one.low) for one in estimates]
    return np.array([below, [max(0.0, one.high - one.value) for one in estimates]])


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
