"""Runs code in an interpreter that has torch, numpy, triton and what these need, and nothing else that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
THERE = ("torch", "numpy", "triton")

# The names are looked up before anything is hidden. torch does not need its extras.
HIDE = """
import importlib.metadata, re, sys

class Filtered:
    def __init__(self, finder, hidden):
        self._finder, self._hidden = finder, hidden

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in self._hidden else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

def normal(name):
    return name.lower().replace("_", "-")

def hidden(left):
    shown = set()
    while left:
        name = left.pop()
        if name in shown:
            continue
        shown.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        left += [normal(re.match(r"[\\w.-]+", need)[0]) for need in needs if "extra ==" not in need]
    owners = importlib.metadata.packages_distributions()
    ours = {"llama2", "handler", "benchmarks", "scripts", "tests", "apps"}
    return {module for module, names in owners.items() if not shown & set(map(normal, names))} - ours

names = hidden([*THERE])
sys.meta_path[:] = [Filtered(finder, names) for finder in sys.meta_path]
"""


def run_bare(
    code: str, *arguments: str, there: tuple[str, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with `arguments`, at the project's root; `there` are more packages that it may import."""
    return subprocess.run(
        [sys.executable, "-c", HIDE.replace("THERE", repr(THERE + there)) + code, *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
