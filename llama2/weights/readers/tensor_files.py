"""Owns files that hold tensors by name: safetensors and PyTorch's pickles, alone or listed by an index.

Opening one reads names, shapes and dtypes, and runs nothing of it; values are mapped. Knows no model and no naming.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llama2.text.tokenizer_files import read_small_json

# In the order in which they are looked for: one file, then the index of several.
_KINDS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
FILE_NAMES = tuple(name for names in _KINDS for name in names)

# Far more than the list of any model's tensors needs: a damaged file must not cost memory.
_LARGEST_HEADER = 2 << 20


class TensorFiles(Mapping[str, torch.Tensor]):
    """All tensors of a folder, or of one file, by name. `files` are those that were opened."""

    def __init__(self, path: Path) -> None:
        """Open them all.

        Raises:
            ValueError: one is missing, damaged or refused, or an index disagrees with what its files hold.
        """
        self.path = path
        index, names = (None, {path.name}) if path.is_file() else _listed(path)
        folder = path.parent if path.is_file() else path
        self.files = tuple(folder / name for name in sorted(names))
        self._tensors: dict[str, torch.Tensor] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            for name, tensor in open_tensors(file).items():
                if name in self._tensors:
                    raise ValueError(f"tensor {name!r} is in {file} and in {self._file_of[name].name}")
                self._tensors[name], self._file_of[name] = tensor, file
        for name, file_name in (index or {}).items():
            if self._file_of.get(name) != folder / file_name:
                raise ValueError(f"{folder / file_name} has no tensor {name!r}, which the index says is there")

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    def take(self, name: str, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], *, by: str) -> torch.Tensor:
        """A tensor that must have this shape, `by` what some file says, and one of these dtypes.

        Raises:
            ValueError: it is missing, or has others.
        """
        if name not in self:
            raise ValueError(f"{self.path}: tensor {name!r} is missing")
        tensor, file = self[name], self.file_of(name)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{file}: {name} has shape {tuple(tensor.shape)}, expected {shape} by {by}")
        if tensor.dtype not in dtypes:
            allowed = ("one of " if len(dtypes) > 1 else "") + ", ".join(map(str, dtypes))
            raise ValueError(f"{file}: {name} is {tensor.dtype}, expected {allowed}")
        return tensor


def open_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped.

    Raises:
        ValueError: it is missing or damaged, or holds something other than plain tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickled(path)


def own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, contiguous, as a storage that holds nothing else: what torch.save writes without a copy.

    Some files keep several tensors in one storage.
    """
    tensor = tensor.contiguous()
    start = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def _listed(folder: Path) -> tuple[dict[str, str] | None, set[str]]:
    """The index of a folder, if it has one, and the names of the files with tensors."""
    for single, index in _KINDS:
        found = [name for name in (single, index) if (folder / name).is_file()]
        if len(found) == 2:
            raise ValueError(f"{folder} holds both {single} and {index}: only one of them can be the model")
        if found == [single]:
            return None, {single}
        if found == [index]:
            listed = _read_index(folder / index, suffix=Path(single).suffix)
            return listed, set(listed.values())
    raise ValueError(f"{folder} holds none of {', '.join(FILE_NAMES)}")


def _read_index(path: Path, *, suffix: str) -> dict[str, str]:
    """The file of each tensor."""
    listed = read_small_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{path} must have a 'weight_map', the name of a file for each tensor")
    for name in dict.fromkeys(listed.values() if all(isinstance(each, str) for each in listed.values()) else [None]):
        # A link may lead anywhere, as in the hub's own cache; a name may not.
        if name is None or Path(name).name != name or not name.endswith(suffix) or "\0" in name:
            raise ValueError(f"{path} must name files of this folder that end in {suffix}, got {str(name)[:100]!r}")
        if not (path.parent / name).is_file():
            raise ValueError(f"{path.parent / name} is missing: {path.name} names it")
    return listed


def _open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
    if length > min(_LARGEST_HEADER, path.stat().st_size):
        raise ValueError(f"{path} is no whole safetensors file: its header would have {length} bytes")
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is no whole safetensors file: {reason[:200]}") from None


def _open_pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        # torch would decompress, and a small file can hold a large nothing.
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        # Its own message tells the user how to let the file run code.
        raise ValueError(f"{path} is refused: it is damaged, or holds something other than plain tensors") from None
    except Exception as error:
        # A damaged file may raise anything; the first line of it says enough.
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable {path.suffix} file (truncated or damaged?): {reason}") from None
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} must hold a dictionary of tensors, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise ValueError(f"{path}: {name!r} is not a plain tensor")
    return dict(loaded)
