"""Owns the names of the formats, and their description in a converted folder.

`formats.json` says which weights have which format; a weight that is not in it is plain.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from llama2.dtypes import read_dtype
from llama2.weights.formats import Format
from llama2.weights.formats.lut4 import TABLES, Lut4
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q4k import Q4K
from llama2.weights.formats.q8 import Q8
from llama2.weights.kinds import FORMATS_FILE

_KINDS: Mapping[str, Any] = MappingProxyType({"q8": Q8, "q4": Q4, "q4k": Q4K, "lut4": Lut4})
_LARGEST_GROUP = 1 << 20


def save_formats(folder: Path, formats: Mapping[str, Format]) -> None:
    """Write `formats.json` for formats by the names of weights, unless all are plain."""
    described: list[dict[str, Any]] = []
    for each in dict.fromkeys(formats.values()):
        weights = [name for name, own in formats.items() if own == each]
        described.append(_describe(each) | {"weights": weights})
    if described:
        (folder / FORMATS_FILE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def load_formats(folder: Path, names: Iterable[str]) -> dict[str, Format]:
    """The formats of the weights `names`, by name, that are not plain.

    Raises:
        ValueError: the file is damaged, or names what is no weight or no format.
    """
    path = folder / FORMATS_FILE
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    known, formats = set(names), {}
    try:
        for entry in described:
            each = _read({key: value for key, value in entry.items() if key != "weights"})
            for name in entry["weights"]:
                if name not in known or name in formats:
                    raise ValueError(f"{name!r} is no weight of the model, or in it twice")
                formats[name] = each
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from None
    return formats


def name_of(format: Format) -> str:
    """What a user calls it: its kind; or the table that it chooses from, and whether its scales are quantized, too."""
    if isinstance(format, Lut4):
        return f"{format.table}_double" if format.is_double else format.table
    return str(_describe(format)["format"])


def _describe(format: Format) -> dict[str, Any]:
    kind = next(kind for kind, cls in _KINDS.items() if type(format) is cls)
    fields = {field.name: getattr(format, field.name) for field in dataclasses.fields(format)}  # type: ignore[arg-type]
    return {"format": kind} | {
        key: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for key, value in fields.items()
    }


def _read(description: Mapping[str, Any]) -> Format:
    values = dict(description)
    kind = values.pop("format")
    if kind not in _KINDS:
        raise ValueError(f"format must be one of {', '.join(_KINDS)}, got {kind!r}")
    for key in ("group", "super_group"):
        value = values.get(key)
        if value is not None and (type(value) is not int or not 2 <= value <= _LARGEST_GROUP or value % 2):
            raise ValueError(f"{key} must be an even number, got {value!r}")
    zero = values.get("zero")
    if zero is not None and (type(zero) is not int or not 0 <= zero <= 16):
        raise ValueError(f"zero must be 0 to 16, got {zero!r}")
    if values.get("table", "nf4") not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {values['table']!r}")
    if "scales" in values:
        is_double = (kind, values["scales"]) == ("lut4", "uint8")
        name = "uint8" if is_double else read_dtype(values["scales"], "scales")
        values["scales"] = getattr(torch, name or "float32")
    result: Format = _KINDS[kind](**values)
    return result
