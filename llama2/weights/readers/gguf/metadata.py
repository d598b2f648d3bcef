"""Owns access to the metadata of a GGUF file by key and type. Knows no key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", int, float, str, bool)
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Values of Python's types, lists of strings, and arrays of numbers. Each error is a ValueError with the key."""

    path: Path
    values: Mapping[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """One value. `default`: what it is where the file does not say; None: it must."""
        value = self._value(key, default)
        if type(value) is kind:
            return value
        if kind is float and type(value) is int:
            return float(value)  # type: ignore[return-value]
        raise ValueError(f"{self.path}: {key} must be {_NAMES[kind]}, got {_shown(value)}")

    def strings(self, key: str) -> list[str]:
        value = self._value(key)
        if not isinstance(value, list):
            raise ValueError(f"{self.path}: {key} must be an array of strings, got {_shown(value)}")
        return value

    def numbers(self, key: str) -> npt.NDArray[Any]:
        value = self._value(key)
        if not isinstance(value, np.ndarray) or value.dtype == bool:
            raise ValueError(f"{self.path}: {key} must be an array of numbers, got {_shown(value)}")
        return value

    def _value(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise ValueError(f"{self.path}: the metadata has no {key}")
        return value


def _shown(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"an array of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
