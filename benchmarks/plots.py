"""Owns drawing figures: panels of lines side by side, in one PNG file.

Knows no benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series of points. Lines of one `color` belong together; a limit or an offered rate is `dashed`."""

    label: str
    xs: list[float]
    ys: list[float]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes, with its lines. A logarithmic x axis has its ticks at the points of the lines, a logarithmic y
    axis at 1, 2 and 5 of each power of ten."""

    title: str
    x: str
    y: str
    lines: list[Line]
    log_x: bool = False
    log_y: bool = False


def draw(path: Path | str, title: str, panels: list[Panel]) -> Path:
    """Write the panels as one PNG file and return its path; creates folders, and replaces an earlier file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter

    path = Path(path)
    figure = Figure(figsize=(6.5 * len(panels), 5), layout="constrained")
    figure.suptitle(title)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line in panel.lines:
            style, fill = ("--", "none") if line.dashed else ("-", "full")
            looks = {"color": f"C{line.color}", "marker": "o", "fillstyle": fill, "markersize": 4}
            axes.plot(line.xs, line.ys, style, label=line.label, **looks)
        if panel.log_x:
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({x for line in panel.lines for x in line.xs}))
            axes.xaxis.set_major_formatter(ScalarFormatter())
        if panel.log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        axes.grid(alpha=0.3)
        if panel.lines:
            axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
