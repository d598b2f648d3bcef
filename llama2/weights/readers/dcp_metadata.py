"""Owns the reading of `.metadata`, the list of tensors in a folder of torch.distributed.checkpoint (DCP).

The file is a pickle, and anybody may have written it. No program in it is run: the names of DCP's classes stand for
records of ours, every other name is refused, and DCP's own objects are made of what the records say. Knows no model and
no values.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

_METADATA = "torch.distributed.checkpoint.metadata"
_CLASSES = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int32)
}
# What DCP's pickles are made of. Others could ask for memory that the file does not have.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD),
)


def read_metadata(path: Path) -> Metadata:
    """What DCP needs to load tensors: their shapes, dtypes and pieces, and where each piece is.

    Raises:
        ValueError: the file is damaged, or holds anything that DCP does not write there.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    try:
        found = _fields(_Unpickler(io.BytesIO(data)).load(), "Metadata")
        return Metadata(
            state_dict_metadata={
                _typed(name, str): _tensor(tensor)
                for name, tensor in _typed(found["state_dict_metadata"], dict).items()
            },
            planner_data={},
            storage_data={_index(index): _place(place) for index, place in _typed(found["storage_data"], dict).items()},
        )
    except _Refused as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception:  # whatever damage leads to
        raise ValueError(f"{path} cannot be read: it is damaged, or no list of tensors") from None


class _Refused(ValueError):
    """What is wrong with the file, in words for its user."""


class _Record:
    """An object in the pickle, as it was written: the arguments that made it, and its state."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> _Record:
        record = object.__new__(cls)
        record.args, record.state = args, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    # The one in C cannot be kept from single operations.
    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._records: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _CLASSES:
            raise _Refused(f"it names {module}.{name}, which no list of tensors needs; it may be an attack")
        # Made for each reading: a pickle that changes a class changes its own.
        return self._records.setdefault(name, type(name, (_Record,), {}))


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _Refused(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _record(value: Any, name: str) -> _Record:
    if not isinstance(value, _Record) or type(value).__name__ != name:
        raise _Refused(f"expected {name}, found {type(value).__name__}")
    return value


def _fields(value: Any, name: str) -> dict[str, Any]:
    fields: dict[str, Any] = _typed(_record(value, name).state, dict)
    return fields


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise _Refused(f"a size or a place must be a whole number of 0 or more, found {value!r:.50}")
    return value


def _size(value: Any) -> torch.Size:
    (sizes,) = _record(value, "Size").args
    return torch.Size([_count(size) for size in _typed(sizes, tuple)])


def _tensor(value: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if isinstance(value, _Record) and type(value).__name__ == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(value, "TensorStorageMetadata")
    dtype, *_ = _typed(_record(fields["properties"], "TensorProperties").state, tuple)
    size = _size(fields["size"])
    chunks = [
        ChunkStorageMetadata(offsets=_size(chunk["offsets"]), sizes=_size(chunk["sizes"]))
        for chunk in (_fields(chunk, "ChunkStorageMetadata") for chunk in _typed(fields["chunks"], list))
    ]
    for chunk in chunks:
        ends = [at + count for at, count in zip(chunk.offsets, chunk.sizes, strict=True)]
        if not all(end <= whole for end, whole in zip(ends, size, strict=True)):
            raise _Refused(f"a piece at {tuple(chunk.offsets)} goes beyond its tensor of {tuple(size)}")
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size):
        raise _Refused(f"the pieces of a tensor of {tuple(size)} are not the whole of it")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=_typed(dtype, torch.dtype)), size=size, chunks=chunks
    )


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, "MetadataIndex")
    offset, index = fields.get("offset"), fields.get("index")
    return MetadataIndex(
        _typed(fields["fqn"], str),
        None if offset is None else _size(offset),
        None if index is None else _count(index),
    )


def _place(value: Any) -> _StorageInfo:
    fields = _fields(value, "_StorageInfo")
    name = _typed(fields["relative_path"], str)
    if Path(name).name != name or not name.endswith(DEFAULT_SUFFIX):
        raise _Refused(f"the values of a tensor are in {name!r:.80}, which is no file of this folder with values")
    if fields.get("transform_descriptors"):
        raise _Refused("its values are compressed or encrypted")
    return _StorageInfo(relative_path=name, offset=_count(fields["offset"]), length=_count(fields["length"]))
