"""Owns the fast way into memory: a DCP folder's files are mapped, and each value is copied once, to where it is needed.

What is read is compared with the folder's hashes, if it has any. DCP's own reader unpickles every stored piece whole
before it takes what it needs of it. Knows no model.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from llama2.weights.manifest import CheckedFile, Manifest
from llama2.weights.readers.dcp_metadata import read_metadata

if TYPE_CHECKING:
    from typing_extensions import Buffer


METADATA_FILE = ".metadata"


class _Mapped(NamedTuple):
    """A file in memory, and its hashes, if there are any."""

    data: mmap.mmap
    checked: CheckedFile | None

    def check(self, begin: int, end: int) -> None:
        if self.checked is not None:
            self.checked.check(begin, end)


class MappedReader(dcp.FileSystemReader):
    """A reader for any number of `dcp.load`, each with `threads` copies on their way at once.

    `progress` is told the bytes of each piece that has arrived, by any thread.
    """

    def __init__(self, folder: Path, manifest: Manifest | None) -> None:
        super().__init__(folder)
        self.threads = 1
        self.progress: Callable[[int], object] = lambda nbytes: None
        self._folder = folder
        self._manifest = manifest
        self._metadata: Metadata | None = None
        self._files: dict[str, _Mapped] = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        # In place of DCP's own, which would run what the file says.
        if self._metadata is None:
            self._metadata = read_metadata(self._folder / METADATA_FILE)
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        def copy(item: ReadItem) -> None:
            file, begin, piece = self._stored(item)
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                piece = piece.narrow(axis, start, length)
            if piece.numel():
                first = int(piece.storage_offset())
                last = first + sum(step * (size - 1) for step, size in zip(piece.stride(), piece.shape, strict=True))
                file.check(begin + first * piece.itemsize, begin + (last + 1) * piece.itemsize)
            target = planner.resolve_tensor(item).detach()
            target.copy_(piece)
            planner.commit_tensor(item, target)
            self.progress(target.nbytes)

        items = sorted(plan.items, key=self._place)
        for name in {name for name, _ in map(self._place, items)}:
            self._map(name)
        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(copy, items))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        stored = self.storage_data[item.storage_index]
        return stored.relative_path, stored.offset

    def _stored(self, item: ReadItem) -> tuple[_Mapped, int, torch.Tensor]:
        """The stored piece that an item is part of, its file, and where its values begin: nothing of them is read."""
        stored = self.storage_data[item.storage_index]
        file = self._map(stored.relative_path)
        if stored.offset + stored.length > len(file.data):
            raise ValueError(
                f"{self._folder / stored.relative_path} ends after {len(file.data)} bytes, in the middle of a tensor"
            )
        window = _Window(file, stored.offset, stored.length)
        # On the meta device torch.load reads the description alone, and says where the values begin.
        try:
            described = torch.load(io.BufferedReader(window), map_location="meta", weights_only=True)
        except Exception:
            raise window.damage or ValueError(
                f"{self._folder / stored.relative_path} holds no tensor at byte {stored.offset}"
            ) from None
        storage = described.untyped_storage()
        begin = stored.offset + storage._checkpoint_offset
        count = storage.nbytes() // described.dtype.itemsize
        values = torch.frombuffer(file.data, dtype=described.dtype, count=count, offset=begin)
        return file, begin, values.as_strided(described.shape, described.stride(), described.storage_offset())

    def _map(self, name: str) -> _Mapped:
        if name not in self._files:
            with open(self._folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                # A private mapping is writable, as torch wants its memory, and writes would not reach the file.
                data = mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE)
            self._files[name] = _Mapped(data, self._manifest.open(name, data) if self._manifest else None)
        return self._files[name]


class _Window(io.RawIOBase):
    """A part of a mapped file, as a file that can be read and sought."""

    def __init__(self, file: _Mapped, offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._data = memoryview(file.data)[offset : offset + length]
        self._at = 0
        # What `check` found, which torch.load would replace with errors of its own.
        self.damage: ValueError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: len(self._data)}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Buffer, /) -> int:
        target = memoryview(buffer).cast("B")
        part = self._data[self._at : self._at + len(target)]
        try:
            self._file.check(self._offset + self._at, self._offset + self._at + len(part))
        except ValueError as damage:
            self.damage = damage
            raise
        target[: len(part)] = part
        self._at += len(part)
        return len(part)
