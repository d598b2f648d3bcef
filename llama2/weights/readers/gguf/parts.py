"""Owns the way from one file of a GGUF model to all of it, where it was split over several."""

from __future__ import annotations

import re
from pathlib import Path

from llama2.weights.readers.gguf.header import Header, StoredTensor, read_header

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def read_parts(path: Path) -> Header:
    """The header of a file; if it is one of several, the metadata of the first one and the tensors of all.

    Raises:
        ValueError: as `read_header`, or a part is missing or belongs to another model.
    """
    name = _PART.fullmatch(path.name)
    if name is None:
        whole = read_header(path)
        count = whole.metadata.get("split.count", int, 1)
        if count != 1:
            raise ValueError(f"{path} is one of {count} parts: its name must say so, as in model-00001-of-00003.gguf")
        return whole
    paths = [path.with_name(f"{name[1]}-{number + 1:05}-of-{name[3]}.gguf") for number in range(int(name[3]))]
    if path not in paths:
        raise ValueError(f"{path} is none of {len(paths)} parts")
    # Each of the parts is looked for before one is read.
    for part in paths:
        if not part.is_file():
            raise ValueError(f"{part} is missing: the model is in {len(paths)} parts")
    headers = [_read_part(part, number, len(paths)) for number, part in enumerate(paths)]
    tensors: dict[str, StoredTensor] = {}
    for part, header in zip(paths, headers, strict=True):
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise ValueError(f"{part} has tensor {min(twice)!r}, which an earlier part has, too")
        tensors |= header.tensors
    metadata = headers[0].metadata
    expected = metadata.get("split.tensors.count", int, len(tensors))
    if expected != len(tensors):
        raise ValueError(f"{paths[0]} says that all parts have {expected} tensors, and they have {len(tensors)}")
    return Header(metadata=metadata, tensors=tensors)


def _read_part(path: Path, number: int, count: int) -> Header:
    header = read_header(path)
    said = tuple(header.metadata.get(key, int) for key in ("split.no", "split.count"))
    if said != (number, count):
        raise ValueError(f"{path} says that it is part {said[0] + 1} of {said[1]}: it has another one's name")
    return header
