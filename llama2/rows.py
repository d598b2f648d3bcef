"""Owns a user's file of samples, JSONL or CSV, as rows with the names of their columns.

Knows no column. Whatever is wrong with a file is a ValueError that names the file, the line and what is there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llama2.errors import shown

# CSV's fields may be whole documents.
LARGEST_FIELD = 1 << 27


class Row(NamedTuple):
    """`line` is where it begins in its file. What is in a CSV is text."""

    line: int
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, without empty lines.

    Raises:
        ValueError: the file cannot be read, or a line of it is wrong.
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
    return readers[path.suffix](path, content)


def _json_rows(path: Path, content: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: is no JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}, line {number}: must be a JSON object, got {shown(values)}")
        yield Row(number, values)


def _csv_rows(path: Path, content: str) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_FIELD)
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
                yield Row(line, dict(zip(header, values, strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: is no CSV: {error}") from None
