"""Owns Meta's checkpoint layout: `params.json` and the Fairscale shards `consolidated.NN.pth`.

Reads it through mmap and writes it into files mapped shared, so that neither way holds a model in memory. Knows nothing
of torch.distributed, of the tokenizer's files, or of what the weights are for.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from llama2.config import ModelArgs
from llama2.weights.readers import Chunk, check_layers
from llama2.weights.readers.tensor_files import open_tensors, own_storage
from llama2.weights.spec import Spec

logger = logging.getLogger(__name__)

PARAMS_FILE = "params.json"

# A buffer that Meta's code saved by accident; it follows from rope_theta.
IGNORED = frozenset({"rope.freqs"})

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shard_axis(name: str) -> int | None:
    """The axis that Llama 2's shards split a parameter along, at rest and in Meta's shape alike; None: replicated."""
    if name.endswith("norm.weight"):
        return None
    return 1 if name.endswith((".wo.weight", ".w2.weight", "tok_embeddings.weight")) else 0


def meta_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in Meta's file of a parameter, or a part of one, that has `shape` at rest."""
    if name.endswith(".wo.weight"):
        return (shape[0], math.prod(shape[1:]))
    return shape if len(shape) == 1 else (math.prod(shape[:-1]), shape[-1])


def shard_file(folder: Path, index: int) -> Path:
    return folder / f"consolidated.{index:02d}.pth"


class FairscaleFolder:
    """Meta's folder, opened and checked, with its weights mapped and not read.

    Attributes:
        spec: all of its tensors.
        num_shards: number of `consolidated.NN.pth`, Meta's model parallel size.

    Raises:
        ValueError: `params.json` or a shard is missing, damaged, or disagrees with the others. One line that names it.
    """

    def __init__(self, folder: Path | str, *, vocab_size: int | None, num_shards: int | None = None) -> None:
        self.path = Path(folder)
        args = ModelArgs.from_params(_read_params(self.path), vocab_size=vocab_size)
        self.num_shards = _count_shards(self.path, num_shards)
        self._shards = [_open_shard(shard_file(self.path, index)) for index in range(self.num_shards)]
        check_layers(args, self._shards[0], PARAMS_FILE, shard_file(self.path, 0))
        check_num_shards(args, self.num_shards)
        self._shapes = args.parameter_shapes()
        self._check_names()
        self._axes = {name: self._checked_axis(name) for name in self._shapes}
        self.spec = Spec(args=args, dtype=self._checked_dtype())

    def chunks(self, name: str) -> list[Chunk]:
        """Each shard's piece of parameter `name`, a mapped view in its at-rest shape; together they tile it.

        Of a replicated parameter the first shard's is taken, as everybody does who reads these files. Copies that
        differ in their last bits are reported: the ranks of a long training may drift apart.

        Raises:
            ValueError: the copies of a replicated parameter are too different to belong to one model.
        """
        shape, axis = self._shapes[name], self._axes[name]
        if axis is None:
            first = self._shards[0][name]
            for index, shard in enumerate(self._shards[1:], start=1):
                self._check_copy(name, first, shard[name], index)
        part = _part(shape, axis, self.num_shards)

        def chunk(index: int) -> Chunk:
            offsets = tuple(index * size if i == axis else 0 for i, size in enumerate(part))
            view = own_storage(self._shards[index][name]).view(part)
            return Chunk(name=name, offsets=offsets, shape=part, read=lambda: view)

        return [chunk(index) for index in range(1 if axis is None else self.num_shards)]

    def read(self, name: str) -> torch.Tensor:
        """Parameter `name` whole, at rest: mapped if one chunk is all of it, else in memory. Errors as `chunks`."""
        views = [chunk.read() for chunk in self.chunks(name)]
        return views[0] if len(views) == 1 else torch.cat(views, dim=self._axes[name] or 0)

    def _check_copy(self, name: str, first: torch.Tensor, copy: torch.Tensor, index: int) -> None:
        if same_bits(first, copy):
            return
        files = f"{shard_file(self.path, 0).name} and {shard_file(self.path, index).name}"
        if not torch.allclose(first.float(), copy.float(), rtol=0.01, atol=0.01, equal_nan=True):
            raise ValueError(f"{name} must be the same in every shard of {self.path}, but {files} differ: two models?")
        logger.warning("%s differs slightly between %s: the first is taken", name, files)

    def _check_names(self) -> None:
        for index, shard in enumerate(self._shards):
            file = shard_file(self.path, index)
            for name in sorted(shard.keys() - self._shapes.keys()):
                raise ValueError(f"{file}: unknown tensor {name!r}, which {PARAMS_FILE} does not account for")
            for name in sorted(self._shapes.keys() - shard.keys()):
                raise ValueError(f"{file}: tensor {name!r} is missing")

    def _checked_axis(self, name: str) -> int | None:
        """The axis that `name` is split along, or an error if some shard's shape fits none."""
        shape, usual = self._shapes[name], shard_axis(name)
        # Llama 3 splits the embedding by rows where Llama 2 splits it by columns.
        axes = [usual, 0] if name == "tok_embeddings.weight" else [usual]
        found = {index: tuple(shard[name].shape) for index, shard in enumerate(self._shards)}
        for axis in axes:
            expected = meta_shape(name, _part(shape, axis, self.num_shards))
            if all(shape == expected for shape in found.values()):
                return axis
        expected = meta_shape(name, _part(shape, usual, self.num_shards))
        index = next(index for index, shape in found.items() if shape != expected)
        raise ValueError(
            f"{shard_file(self.path, index)}: {name} has shape {found[index]}, "
            f"expected {expected} by {PARAMS_FILE} and {self.num_shards} shard(s)"
        )

    def _checked_dtype(self) -> torch.dtype:
        dtype = self._shards[0]["norm.weight"].dtype
        if dtype not in DTYPES:
            allowed = ", ".join(str(allowed) for allowed in DTYPES)
            raise ValueError(f"{shard_file(self.path, 0)}: norm.weight is {dtype}, expected one of {allowed}")
        for index, shard in enumerate(self._shards):
            for name, tensor in shard.items():
                if tensor.dtype != dtype:
                    raise ValueError(
                        f"{shard_file(self.path, index)}: {name} is {tensor.dtype}, but norm.weight of "
                        f"{shard_file(self.path, 0).name} is {dtype}; all weights must have one dtype"
                    )
        return dtype


def check_num_shards(args: ModelArgs, num_shards: int) -> None:
    """Raise ValueError unless `num_shards` divides every axis that is split, those that count heads among them."""
    axes = ((shape, shard_axis(name)) for name, shape in args.parameter_shapes().items())
    divisible = math.gcd(*(shape[axis] for shape, axis in axes if axis is not None))
    if divisible % num_shards:
        allowed = ", ".join(str(number) for number in range(1, divisible + 1) if divisible % number == 0)
        raise ValueError(f"this model does not split evenly into {num_shards} shards; it does into {allowed}")


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of bits: NaN equals itself, and 0 differs from -0."""
    if left.dtype != right.dtype:
        return False
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[left.itemsize]
    return torch.equal(left.view(bits), right.view(bits))


def write_fairscale(
    folder: Path | str,
    args: ModelArgs,
    read: Callable[[str], torch.Tensor],
    *,
    num_shards: int,
    dtype: torch.dtype,
) -> None:
    """Write Meta's folder (without a tokenizer) from one process.

    `read(name)` returns a whole parameter, in Meta's shape or at rest. It is asked once for each, and only one is held.

    Raises:
        ValueError: `num_shards` does not divide the model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reserve_shards(folder, args, num_shards=num_shards, dtype=dtype, indices=range(num_shards))
    fill_shards(folder, args, read, num_shards=num_shards, names=args.parameter_shapes())
    write_params(folder, args)


def reserve_shards(
    folder: Path, args: ModelArgs, *, num_shards: int, dtype: torch.dtype, indices: Iterable[int]
) -> None:
    """Write the shard files `indices` of `num_shards` in full size, with room where the values will stand."""
    check_num_shards(args, num_shards)
    for index in indices:
        weights = {
            name: torch.empty(meta_shape(name, _part(shape, shard_axis(name), num_shards)), dtype=dtype)
            for name, shape in args.parameter_shapes().items()
        }
        path = shard_file(folder, index)
        try:
            with torch.serialization.skip_data():
                torch.save(weights, path)
        except RuntimeError as error:
            raise OSError(f"{path} cannot be written (is the disk full?): {error}") from error
        with path.open("rb+") as file:
            # The file has holes where its values belong: a disk that fills up later would kill the writer by SIGBUS.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def fill_shards(
    folder: Path, args: ModelArgs, read: Callable[[str], torch.Tensor], *, num_shards: int, names: Iterable[str]
) -> None:
    """Write the values of the parameters `names` into every shard file that `reserve_shards` made, and sync them.

    Several processes may do this at once, each for names of its own.
    """
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        shards = [_open_shard(shard_file(folder, index)) for index in range(num_shards)]
    for name in names:
        axis = shard_axis(name)
        whole = read(name)
        whole = whole.reshape(meta_shape(name, args.parameter_shapes()[name]))
        parts = [whole] * num_shards if axis is None else whole.chunk(num_shards, dim=axis)
        for shard, part in zip(shards, parts, strict=True):
            shard[name].copy_(part)
    for index in range(num_shards):
        with shard_file(folder, index).open("rb+") as file:
            os.fsync(file.fileno())


def write_params(folder: Path, args: ModelArgs) -> None:
    (folder / PARAMS_FILE).write_text(json.dumps(args.to_params(), indent=2) + "\n", encoding="utf-8")


def _part(shape: tuple[int, ...], axis: int | None, num_shards: int) -> tuple[int, ...]:
    return tuple(size // num_shards if i == axis else size for i, size in enumerate(shape))


def _read_params(folder: Path) -> dict[str, object]:
    path = folder / PARAMS_FILE
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: expected Meta's folder as downloaded") from None
    except (UnicodeDecodeError, json.JSONDecodeError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(params, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(params).__name__}")
    return params


def _count_shards(folder: Path, expected: int | None) -> int:
    names = {path.name for path in folder.glob("consolidated.*.pth")}
    if not names:
        raise ValueError(f"{folder} holds no consolidated.00.pth")
    count = len(names) if expected is None else expected
    for index in range(max(count, len(names))):
        if shard_file(folder, index).name not in names and index < count:
            wanted = "" if expected is None else f" (--model_parallel_size is {expected})"
            raise ValueError(f"{shard_file(folder, index)} is missing: the folder holds {len(names)} shards{wanted}")
    if len(names) != count:
        raise ValueError(f"--model_parallel_size is {expected}, but {folder} holds {len(names)} shards")
    return count


def _open_shard(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in open_tensors(path).items() if name not in IGNORED}
