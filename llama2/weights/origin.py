"""Owns `origin.json` of a folder with weights: in which precisions their values were stored, from file to file, and
what else became of them on the way: adapters that were merged, and hidden features in another order.

A folder in bf16 may hold what was a quantized file once. Knows no torch and no file with weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

ORIGIN_FILE = "origin.json"

# Number of values by the precision that a source's files have them in, in the words of those files.
Stored = Mapping[str, int]
# The "adapter" that was added to what was stored so, by its identity, and "onto" which values: see `merge`.
Merged = Mapping[str, str]
# Some layers' hidden features were brought into another order.
SORTED: Mapping[str, str] = MappingProxyType({"sorted": "hidden features"})
# From the first files known to those that a folder was made of: `Stored` or `Merged` each, or SORTED.
Origin = tuple[Mapping[str, Any], ...]

_PLAIN = frozenset({"bfloat16", "float16", "float32", "BF16", "F16", "F32"})


def read_origin(folder: Path) -> Origin:
    """Empty where the folder does not say.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / ORIGIN_FILE
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(steps, list) or not all(_is_stored(step) or _is_event(step) for step in steps):
        raise ValueError(f"{path} must be a list of objects with numbers of values, by precision, or of events")
    return tuple(steps)


def write_origin(folder: Path, origin: Origin) -> None:
    text = json.dumps([dict(step) for step in origin], indent=1) + "\n"
    (folder / ORIGIN_FILE).write_text(text, encoding="utf-8")


def extended(origin: Origin, stored: Stored) -> Origin:
    """`origin` and what was `stored` after it, if that is something else."""
    return origin if origin and origin[-1] == stored else (*origin, stored)


def count_values(weights: Iterable[tuple[str, int]]) -> Stored:
    """Of the precision of each weight and its number of values."""
    counts: dict[str, int] = {}
    for precision, values in weights:
        counts[precision] = counts.get(precision, 0) + values
    return counts


def describe(origin: Origin) -> str:
    """A sentence on what the values of a reference are, for whoever compares something with it."""
    if not origin:
        return "In which precision these values were stored first is not recorded: convert them anew to have it."
    files = [step for step in origin if not _is_event(step)]
    quantized = [words for step in files if (words := _quantized(step))]
    adapters = [step["adapter"] for step in origin if "adapter" in step]
    merged = f" Adapters were merged into them: {', '.join(adapters)}." if adapters else ""
    if not quantized:
        return f"These values were stored as {' and '.join(files[0])} first, and never quantized since.{merged}"
    return (
        f"These values were stored as {', then as '.join(quantized)} before: weights that keep those codes lose "
        f"nothing by construction, and what was lost when they were made is not measured here.{merged}"
    )


def is_quantized(stored: Stored) -> bool:
    return not stored.keys() <= _PLAIN


def _quantized(stored: Stored) -> str:
    """The precisions that are not plain, with their shares of all values."""
    shares = {name: count / sum(stored.values()) for name, count in stored.items() if name not in _PLAIN}
    return " and ".join(f"{name} ({share:.0%})" for name, share in shares.items())


def _is_stored(step: Any) -> bool:
    return isinstance(step, dict) and all(type(count) is int and count > 0 for count in step.values())


def _is_event(step: Any) -> bool:
    merged = isinstance(step, dict) and step.keys() == {"adapter", "onto"}
    return step == SORTED or (merged and all(isinstance(word, str) for word in step.values()))
