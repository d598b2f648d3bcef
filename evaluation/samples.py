"""Owns a user's data: samples of a JSONL or CSV file, by the names of two columns.

Knows no task. Whatever is wrong with a file is a ValueError that names the file, the line and what is there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import shown


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
    readers = {".jsonl": _json_rows, ".csv": _csv_rows}
    if path.suffix not in readers:
        raise ValueError(f"{path} must be JSONL or CSV: the name must end with .jsonl or .csv")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: byte {error.start}") from None
    samples = [
        Sample(text=_value(path, line, row, text), target=_value(path, line, row, target), line=line)
        for line, row in readers[path.suffix](path, content)
    ]
    if not samples:
        raise ValueError(f"{path} has no samples: expected lines with the columns {text!r} and {target!r}")
    return samples


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value in each line; creates folders, and replaces an earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def _json_rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {shown(row)}")
        yield number, row


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = csv.reader(io.StringIO(content, newline=""), strict=True)
    end, header = 0, None
    try:
        for values in lines:
            line, end = end + 1, lines.line_num
            if not values:
                continue
            if header is None:
                header = values
            elif len(values) != len(header):
                raise ValueError(
                    f"{path}, line {line}: must have {len(header)} columns as the header has, got {len(values)}"
                )
            else:
                yield line, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: is no CSV: {error}") from None


def _value(path: Path, line: int, row: dict[str, Any], column: str) -> str:
    if column not in row:
        raise ValueError(f"{path}, line {line}: has no column {column!r}, but {', '.join(map(repr, row)) or 'none'}")
    value = row[column]
    if isinstance(value, int) and not isinstance(value, bool):  # labels may be numbers
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{path}, line {line}: column {column!r} must be a text, got {shown(value)}")
    return value
