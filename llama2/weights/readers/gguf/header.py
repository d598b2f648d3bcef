"""Owns the header of a GGUF file: its metadata, and where its tensors are. Knows no architecture.

Every count, length and place is held against the file before anything is made of it, so that no header, whatever it
claims, takes more than a moment. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.constants import GGUFValueType as Kind

from llama2.weights.readers.gguf.metadata import Metadata

_VERSIONS = (2, 3)
# No header of a model comes near these.
_MOST_BYTES = 1 << 25
_MOST_ENTRIES = 1 << 16
_MOST_STRINGS = 3 << 18
_MOST_AXES = 4
_ALIGNMENT = 32

_LENGTH = struct.Struct("<Q")
_SCALARS: Mapping[Kind, np.dtype[Any]] = {
    Kind.UINT8: np.dtype("<u1"),
    Kind.INT8: np.dtype("<i1"),
    Kind.UINT16: np.dtype("<u2"),
    Kind.INT16: np.dtype("<i2"),
    Kind.UINT32: np.dtype("<u4"),
    Kind.INT32: np.dtype("<i4"),
    Kind.FLOAT32: np.dtype("<f4"),
    Kind.BOOL: np.dtype("?"),
    Kind.UINT64: np.dtype("<u8"),
    Kind.INT64: np.dtype("<i8"),
    Kind.FLOAT64: np.dtype("<f8"),
}


class StoredTensor(NamedTuple):
    """A tensor as it is stored. `shape` begins with the outputs; `data` are the bytes of each row, mapped."""

    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says."""

    metadata: Metadata
    tensors: Mapping[str, StoredTensor]


def read_header(path: Path) -> Header:
    """Read the header of one file, and map its tensors.

    Raises:
        ValueError: it is no whole GGUF file; the message names it.
    """
    try:
        with path.open("rb") as file:
            return _read(_Cursor(file.read(_MOST_BYTES)), path, path.stat().st_size)
    except (OSError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from None


class _Cursor:
    """A place in the bytes that a file begins with, which reading moves on."""

    def __init__(self, content: bytes) -> None:
        self.at = 0
        self._content = content
        self._strings_left = _MOST_STRINGS

    def take(self, size: int) -> bytes:
        if size > len(self._content) - self.at:
            raise ValueError(f"its header does not end within {len(self._content)} bytes")
        self.at += size
        return self._content[self.at - size : self.at]

    def number(self, kind: Kind) -> Any:
        return self.numbers(kind, 1)[0].item()

    def numbers(self, kind: Kind, count: int) -> npt.NDArray[Any]:
        dtype = _SCALARS[kind]
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def strings(self, count: int) -> list[str]:
        self._strings_left -= count
        if self._strings_left < 0:
            raise ValueError(f"its metadata has more than {_MOST_STRINGS} strings")
        content, at, end, found = self._content, self.at, len(self._content), []
        for _ in range(count):
            (size,) = _LENGTH.unpack_from(content, at)
            at += _LENGTH.size
            if size > end - at:
                raise ValueError(f"a string at byte {at} has {size} bytes, more than the header")
            found.append(str(content[at : at + size], "utf-8"))
            at += size
        self.at = at
        return found

    def string(self) -> str:
        return self.strings(1)[0]

    def value(self) -> Any:
        """A value of the metadata, behind its type."""
        kind = self._kind()
        if kind == Kind.STRING:
            return self.string()
        if kind != Kind.ARRAY:
            return self.number(kind)
        kind, count = self._kind(), self.number(Kind.UINT64)
        if kind == Kind.ARRAY:
            raise ValueError("its metadata has arrays in arrays")
        return self.strings(count) if kind == Kind.STRING else self.numbers(kind, count)

    def _kind(self) -> Kind:
        return Kind(self.number(Kind.UINT32))


class _Place(NamedTuple):
    """Where a tensor is, counted from the first of all."""

    offset: int
    nbytes: int
    type: GGMLQuantizationType
    shape: tuple[int, ...]


def _read(cursor: _Cursor, path: Path, size: int) -> Header:
    if cursor.take(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version = cursor.number(Kind.UINT32)
    if version not in _VERSIONS:
        raise ValueError(f"it is of version {version}, and only {', '.join(map(str, _VERSIONS))} are read")
    num_tensors, num_values = (cursor.number(Kind.UINT64) for _ in range(2))
    for what, count in (("tensors", num_tensors), ("values of metadata", num_values)):
        if count > _MOST_ENTRIES:
            raise ValueError(f"it says that it has {count} {what}")
    values: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in values:
            raise ValueError(f"its metadata has {key!r} twice")
        values[key] = cursor.value()
    places: dict[str, _Place] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in places:
            raise ValueError(f"it has tensor {name!r} twice")
        places[name] = _read_place(cursor, name)
    alignment = values.get("general.alignment", _ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two from 8 up, got {alignment!r}")
    first = -(-cursor.at // alignment) * alignment
    _check_places(places, alignment, size - first)
    # Pages that a tensor's user writes to would be copies of its own.
    mapped = np.memmap(path, dtype=np.uint8, mode="c")
    return Header(
        metadata=Metadata(path=path, values=values),
        tensors={name: _map(mapped, first, place) for name, place in places.items()},
    )


def _read_place(cursor: _Cursor, name: str) -> _Place:
    num_axes = cursor.number(Kind.UINT32)
    if not 1 <= num_axes <= _MOST_AXES:
        raise ValueError(f"tensor {name!r} has {num_axes} axes")
    # The file has the axis first whose elements are neighbours.
    shape = tuple(reversed(cursor.numbers(Kind.UINT64, num_axes).tolist()))
    number, offset = cursor.number(Kind.UINT32), cursor.number(Kind.UINT64)
    try:
        kind = GGMLQuantizationType(number)
        values, nbytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise ValueError(f"tensor {name!r} is of type {number}, which the gguf package does not know") from None
    if 0 in shape or shape[-1] % values:
        raise ValueError(f"tensor {name!r} has the shape {shape}, which blocks of {values} do not fill")
    return _Place(offset, math.prod(shape) // values * nbytes, kind, shape)


def _check_places(places: Mapping[str, _Place], alignment: int, size: int) -> None:
    """Raises ValueError unless each tensor is in the `size` bytes that there are for them, and no two overlap."""
    end, last = 0, ""
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.offset % alignment:
            raise ValueError(f"tensor {name!r} begins at {place.offset}, which is no multiple of {alignment}")
        if place.offset < end:
            raise ValueError(f"the tensors {last!r} and {name!r} overlap")
        end, last = place.offset + place.nbytes, name
        if end > size:
            raise ValueError(f"tensor {name!r} ends {end - size} bytes after the file does")


def _map(mapped: npt.NDArray[np.uint8], first: int, place: _Place) -> StoredTensor:
    begin = first + place.offset
    rows = math.prod(place.shape[:-1])
    return StoredTensor(place.type, place.shape, mapped[begin : begin + place.nbytes].reshape(rows, -1))
