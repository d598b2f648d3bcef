"""Owns `manifest.json` of a converted folder: the hashes of its files, and the comparison of what is read with them.

They find damage: on a disk, in memory, in a copy. They do not find forgery, since who can change a file can change its
hash as well. Knows no tensors. xxhash is imported where something is hashed: a model of random weights needs none.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xxhash
    from typing_extensions import Buffer

MANIFEST_FILE = "manifest.json"

_HASH = "xxh3_128"
# Bytes that have one hash: a rank hashes those blocks alone that hold something of its share.
_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHashes:
    """A file's size in bytes, and the hash of each of its blocks."""

    size: int
    blocks: tuple[str, ...]


class Hashing:
    """The hashes of a file that is being written, from its first byte to its last."""

    def __init__(self) -> None:
        self._size = 0
        self._blocks: list[str] = []
        self._current = _xxh3_128()

    def update(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            part = rest[: _BLOCK - self._size % _BLOCK]
            self._current.update(part)
            self._size += len(part)
            rest = rest[len(part) :]
            if self._size % _BLOCK == 0:
                self._end_block()

    def result(self) -> FileHashes:
        if self._size % _BLOCK:
            self._end_block()
        return FileHashes(size=self._size, blocks=tuple(self._blocks))

    def _end_block(self) -> None:
        self._blocks.append(self._current.hexdigest())
        self._current.reset()


class CheckedFile:
    """A mapped file whose blocks are compared with their hashes once each, before they are read."""

    def __init__(self, path: Path, data: mmap.mmap, expected: FileHashes) -> None:
        self._path = path
        self._data = memoryview(data)
        self._expected = expected
        self._good: set[int] = set()

    def check(self, begin: int, end: int) -> None:
        """Compare the blocks that bytes `begin` to `end` are in. Any thread may do it, and several at once.

        Raises:
            ValueError: one differs.
        """
        for block in range(begin // _BLOCK, -(-end // _BLOCK)):
            if block not in self._good:
                data = self._data[block * _BLOCK : (block + 1) * _BLOCK]
                if _xxh3_128(data).hexdigest() != self._expected.blocks[block]:
                    raise ValueError(
                        f"{self._path} is damaged: bytes {block * _BLOCK} to {block * _BLOCK + len(data)} are not "
                        "what was written"
                    )
                self._good.add(block)


class Manifest:
    """The hashes of a folder's files, by name."""

    def __init__(self, folder: Path, files: Mapping[str, FileHashes]) -> None:
        self._folder = folder
        self._files = files

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where the folder has none.

        Raises:
            ValueError: it is damaged.
        """
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        try:
            files = {
                str(name): FileHashes(size=file["size"], blocks=tuple(file["blocks"]))
                for name, file in content["files"].items()
            }
            whole = content == _content(files)
        except (TypeError, KeyError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(f"{path} is damaged, or not a {MANIFEST_FILE} of this version")
        return cls(folder, files)

    def write(self) -> None:
        """Write it, with the hashes of all files in the folder that it does not have yet."""
        files = dict(self._files)
        for path in sorted(self._folder.iterdir()):
            if path.name not in files:
                files[path.name] = _hash_file(path)
        self._save(files)

    def put(self, name: str, data: bytes) -> None:
        """Write a file into the folder, in place of one of that name, and its hashes into the manifest.

        Who is stopped in between leaves a folder in which nothing but that file lacks its hashes.
        """
        others = {other: hashes for other, hashes in self._files.items() if other != name}
        if name in self._files:
            self._save(others)
        _replace(self._folder / name, data)
        hashing = Hashing()
        hashing.update(data)
        self._save(others | {name: hashing.result()})

    def digest(self, wanted: Callable[[str], bool]) -> str:
        """One hash of all files whose names are `wanted`: it changes with any byte of them."""
        files = {name: file for name, file in self._files.items() if wanted(name)}
        return f"{_HASH}:{_content(files)['own']}"

    def _save(self, files: Mapping[str, FileHashes]) -> None:
        text = json.dumps(_content(dict(sorted(files.items()))), indent=1) + "\n"
        _replace(self._folder / MANIFEST_FILE, text.encode())

    def check_sizes(self) -> None:
        """Raises ValueError if a file is missing, shorter or longer than it was."""
        for name, expected in self._files.items():
            path = self._folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing")
            if (size := path.stat().st_size) != expected.size:
                raise ValueError(f"{path} is damaged: it has {size} bytes, and had {expected.size}")

    def check_whole(self, *, but: str) -> None:
        """Compare all files whose names do not end in `but`.

        Raises:
            ValueError: one differs, or is missing; the message names it.
        """
        for name in self._files:
            if not name.endswith(but):
                self.check_file(name)

    def check_file(self, name: str) -> None:
        """Compare a file; of one that it does not know nothing is said.

        Raises:
            ValueError: it differs.
        """
        path = self._folder / name
        if name in self._files and _hash_file(path) != self._files[name]:
            raise ValueError(f"{path} is damaged: it is not what was written")

    def open(self, name: str, data: mmap.mmap) -> CheckedFile:
        """Raises ValueError if it knows no such file."""
        path = self._folder / name
        if name not in self._files:
            raise ValueError(f"{path} is not in {MANIFEST_FILE}")
        return CheckedFile(path, data, self._files[name])


def _replace(path: Path, data: bytes) -> None:
    """Write a file that appears when it is whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)


def _content(files: Mapping[str, FileHashes]) -> dict[str, Any]:
    """What the file holds. It has a hash of its own: else a damaged hash would accuse the file that it belongs to."""
    described = {name: {"size": file.size, "blocks": list(file.blocks)} for name, file in files.items()}
    own = _xxh3_128(json.dumps(described, sort_keys=True).encode()).hexdigest()
    return {"hash": _HASH, "block_bytes": _BLOCK, "own": own, "files": described}


def _hash_file(path: Path) -> FileHashes:
    hashing = Hashing()
    with path.open("rb") as file:
        while part := file.read(_BLOCK):
            hashing.update(part)
    return hashing.result()


def _xxh3_128(data: Buffer = b"") -> xxhash.xxh3_128:
    import xxhash

    return xxhash.xxh3_128(data)
