"""Owns `origin.json` of a folder with weights: in which precisions their values were stored, from file to file.

A folder in bf16 may hold what was a quantized file once. Knows no torch and no file with weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

ORIGIN_FILE = "origin.json"

# Number of values by the precision that a source's files have them in, in the words of those files.
Stored = Mapping[str, int]
# From the first files known to those that a folder was made of.
Origin = tuple[Stored, ...]

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
    counts = [count for step in steps for count in step.values()] if _is_list_of_objects(steps) else [None]
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{path} must be a list of objects with numbers of values, by precision")
    return tuple(steps)


def write_origin(folder: Path, origin: Origin) -> None:
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


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
    quantized = [words for stored in origin if (words := _quantized(stored))]
    if not quantized:
        return f"These values were stored as {' and '.join(origin[0])} first, and never quantized since."
    return (
        f"These values were stored as {', then as '.join(quantized)} before: weights that keep those codes lose "
        "nothing by construction, and what was lost when they were made is not measured here."
    )


def _quantized(stored: Stored) -> str:
    """The precisions that are not plain, with their shares of all values."""
    shares = {name: count / sum(stored.values()) for name, count in stored.items() if name not in _PLAIN}
    return " and ".join(f"{name} ({share:.0%})" for name, share in shares.items())


def _is_list_of_objects(steps: object) -> bool:
    return isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
