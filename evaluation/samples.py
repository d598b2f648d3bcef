"""Owns a user's data: samples of a JSONL or CSV file, by the names of two columns.

Knows no task. Whatever is wrong with a file is a ValueError that names the file, the line and what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import shown
from llama2.rows import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A document, and the label or summary that belongs to it. `line` is where it begins in its file."""

    text: str
    target: str
    line: int = 0


def read_samples(path: Path, *, text: str, target: str) -> list[Sample]:
    """The samples of a file: `text` and `target` are names of columns, which in JSONL are keys.

    Raises:
        ValueError: the file cannot be read or has no sample, or a line lacks a column or has no text in it.
    """
    samples = [
        Sample(text=_value(path, line, values, text), target=_value(path, line, values, target), line=line)
        for line, values in read_rows(path)
    ]
    if not samples:
        raise ValueError(f"{path} has no samples: expected lines with the columns {text!r} and {target!r}")
    return samples


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value in each line; creates folders, and replaces an earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _value(path: Path, line: int, row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"{path}, line {line}: has no column {column!r}, but {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):  # labels may be numbers
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}, line {line}: column {column!r} must be a text, got {shown(value)}")
    return value
