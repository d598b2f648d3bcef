"""Owns the converted folder's weights: how chunks stream into torch.distributed.checkpoint (DCP) files and back.

Knows nothing of where the chunks come from. The way into memory is `mapped`'s.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from llama2.config import MODEL_ARGS_FILE, ModelArgs
from llama2.weights.formats.catalog import load_formats
from llama2.weights.kinds import check_converted
from llama2.weights.manifest import FileHashes, Hashing, Manifest
from llama2.weights.readers import Chunk, check_layers, whole
from llama2.weights.readers.mapped import METADATA_FILE, MappedReader
from llama2.weights.spec import Spec, TensorSpec

if TYPE_CHECKING:
    from typing_extensions import Buffer

_ALIGNMENT = 64


def save_chunks(
    folder: Path,
    chunks: Sequence[Chunk],
    *,
    tensors: Mapping[str, TensorSpec],
    progress: Callable[[int], object],
) -> dict[str, FileHashes]:
    """Write this process's `chunks` into `folder`; a collective if a process group is up.

    The chunks of all processes together tile every tensor of `tensors`, whose dtypes the values are given. `progress`
    is told the bytes of each chunk written. No more than one chunk is held in memory, and none if it is mapped and has
    the right dtype. Returns the hashes of what this process meant to write, by the file's name.

    Raises:
        OSError, ValueError: on every rank, if some rank failed.
    """
    writer = _ChunkWriter(folder)
    with _own_errors():
        dcp.save(
            {},
            storage_writer=writer,
            planner=_ChunkPlanner(chunks, tensors=tensors, progress=progress),
            no_dist=not dist.is_initialized(),
        )
    return writer.hashes


class DcpFolder:
    """A converted folder, opened, and its list of weights compared with the architecture.

    Attributes:
        spec: all of its tensors, for the architecture that was given, else that of `model_args.json`.
        has_hashes: whether its values will be compared with the hashes of what was written.

    Raises:
        ValueError: the folder is no converted checkpoint, a file is damaged (values are compared when they are read),
            or a tensor is missing, unknown, or of another shape.
    """

    def __init__(self, folder: Path | str, args: ModelArgs | None = None, *, rope_scaling: float = 1.0) -> None:
        """The architecture's positions are divided by `rope_scaling`."""
        check_converted(folder)
        self.path = Path(folder)
        manifest = Manifest.read(self.path)
        self.has_hashes = manifest is not None
        if manifest is not None:
            manifest.check_sizes()
            manifest.check_whole(but=DEFAULT_SUFFIX)
        args = args or ModelArgs.load(self.path)
        args = replace(args, rope_scaling=args.rope_scaling * rope_scaling)
        self._reader = MappedReader(self.path, manifest)
        tensors = self._reader.read_metadata().state_dict_metadata
        found = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, TensorStorageMetadata)}
        check_layers(args, tensors, MODEL_ARGS_FILE, self.path / METADATA_FILE)
        dtype = found["norm.weight"].properties.dtype if "norm.weight" in found else torch.float32
        self.spec = Spec(args=args, dtype=dtype, formats=load_formats(self.path, args.weight_axes()))
        self._parts = self.spec.tensors()
        missing, unknown = self._parts.keys() - found.keys(), tensors.keys() - self._parts.keys()
        for what, names in (("lacks", missing), ("has an unknown", unknown)):
            if names:
                raise ValueError(f"checkpoint {self.path} {what} tensor {min(names)} ({len(names)} in all)")
        for name, part in self._parts.items():
            if tuple(found[name].size) != part.shape:
                raise ValueError(
                    f"checkpoint {self.path}: {name} is {tuple(found[name].size)}, but the model's is {part.shape}"
                )

    def load(
        self, state: Mapping[str, torch.Tensor], *, threads: int = 1, progress: Callable[[int], object] | None = None
    ) -> None:
        """Fill tensors, DTensors among them, with their shares of what the folder holds by their names.

        Every rank finds its own pieces: this is no collective. `progress` is told the bytes of each that has arrived.

        Raises:
            ValueError: a file is missing or damaged.
        """
        self._reader.threads, self._reader.progress = threads, progress or (lambda nbytes: None)
        try:
            with _own_errors():
                dcp.load(dict(state), storage_reader=self._reader, no_dist=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"checkpoint {self.path} cannot be loaded: {error}") from error

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name` whole, at rest. Errors as `load`."""
        weight = torch.empty(self._parts[name].shape, dtype=self._parts[name].dtype)
        self.load({name: weight})
        return weight

    def chunks(self, name: str) -> list[Chunk]:
        return whole(self, name, self._parts[name].shape)


@contextmanager
def _own_errors() -> Iterator[None]:
    """DCP wraps what went wrong on some rank into what is no `Exception`. And it warns of one process, which is meant.

    Raises:
        OSError, ValueError: in its place.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assuming the intent is to .* in a single process.*")
            yield
    except CheckpointException as failure:
        error, _ = next(iter(failure.failures.values()))
        if isinstance(error, (OSError, ValueError)) or not isinstance(error, Exception):
            raise error from None
        raise ValueError(str(error) or type(error).__name__) from failure


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Computing a CRC32 takes longer than writing, and torch.load never looks at it."""
    former = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(former)


class _SmallWrites(io.FileIO):
    """A file that takes 256 KB at a time, as `cp` gives it, and hashes them.

    Linux looks for room in the page cache for each write as a whole, and was seen to take 8 times as long for 1 MB.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")
        self.hashing = Hashing()

    def write(self, data: Buffer, /) -> int:
        written = super().write(memoryview(data)[: 1 << 18])
        self.hashing.update(memoryview(data)[:written])
        return written


@contextmanager
def _writing_back(descriptor: int) -> Iterator[None]:
    """Keep the disk busy while the file grows, so that little is left for the fsync at its end.

    Raises:
        OSError: the disk refused something. It is told once, so a later fsync would not hear of it.
    """
    done = threading.Event()

    def flush() -> None:
        while not done.wait(0.1):
            os.fdatasync(descriptor)

    with ThreadPoolExecutor(1) as pool:
        flushing = pool.submit(flush)
        try:
            yield
        finally:
            done.set()
            flushing.result()


class _ChunkPlanner(dcp.DefaultSavePlanner):
    """Plans one item for each chunk, and touches its values only when the writer asks for them."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        *,
        tensors: Mapping[str, TensorSpec],
        progress: Callable[[int], object],
    ) -> None:
        super().__init__(flatten_state_dict=False)
        self._chunks = {MetadataIndex(chunk.name, chunk.offsets): chunk for chunk in chunks}
        self._tensors = tensors
        self._progress = progress

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, chunk in self._chunks.items():
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.shape)),
                properties=TensorProperties(dtype=self._tensors[index.fqn].dtype),
                size=torch.Size(self._tensors[index.fqn].shape),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        values = self._chunks[write_item.index].read()
        self._progress(values.nbytes)
        return values.to(self._tensors[write_item.index.fqn].dtype)


class _ChunkWriter(dcp.FileSystemWriter):
    """Writes DCP's usual files, one for each rank, and lets go of each tensor once it is written.

    The base class keeps every tensor of a file until the file is complete: after a change of dtype, a whole share.
    `hashes` are those of the file that this rank wrote, by its name.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.hashes: dict[str, FileHashes] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        path = Path(self.path) / file
        results = []
        try:
            with _without_checksums(), io.BufferedWriter(raw := _SmallWrites(path)) as stream:
                with _writing_back(stream.fileno()):
                    for item in plan.items:
                        # torch.save puts values on such a border of what it writes: so they are on one of the file.
                        stream.write(bytes(-stream.tell() % _ALIGNMENT))
                        start = stream.tell()
                        torch.save(planner.resolve_data(item), stream)
                        length = stream.tell() - start
                        place = _StorageInfo(relative_path=file, offset=start, length=length)
                        results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
                stream.flush()
                os.fsync(stream.fileno())
            self.hashes[file] = raw.hashing.result()
        except (OSError, RuntimeError) as error:
            # torch.save hides what stopped it, a full disk or a signal, behind a RuntimeError of its own.
            cause = error.__context__ if isinstance(error, RuntimeError) else error
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise cause or error from None
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        # Without the folder's name: the folder is renamed once it is complete.
        return StorageMeta()
