"""Owns the names of the dtypes that weights may have. Knows no torch: `getattr(torch, name)` is the dtype."""

from __future__ import annotations

from typing import Any, Literal

from llama2.errors import InvalidValue, shown

DtypeName = Literal["bfloat16", "float16", "float32"]

_NAMES: dict[str, DtypeName] = {
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
}


def read_dtype(value: Any, field: str = "dtype") -> DtypeName | None:
    """torch's name of a dtype, given as a dtype of torch or by one of its names; None for None and for "auto".

    Raises:
        InvalidValue: it is none of these; `field` is where the user gave it.
    """
    name = str(value).removeprefix("torch.").lower()
    if value is None or name == "auto":
        return None
    if name not in _NAMES:
        raise InvalidValue(field, f"must be bfloat16 (bf16), float16 (fp16) or float32 (fp32), got {shown(value)}")
    return _NAMES[name]
