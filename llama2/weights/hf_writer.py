"""Owns the writing of a Hugging Face folder: which file each weight stands in, and where. Knows no source of weights.

The library's own writer wants all tensors of a file in memory; here any number of processes fill the files, a tensor at
a time. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from llama2.config import ModelArgs
from llama2.text.tokenizer import Tokenizer
from llama2.weights.readers.hf_config import CONFIG_FILE, describe
from llama2.weights.readers.hf_layout import halves_from_pairs, hf_name, hf_shapes, is_rotated

_LARGEST_FILE = 5_000_000_000
_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Values begin on such a border, as the library's own writer has it.
_ALIGNMENT = 8


class HuggingFaceWriter:
    """A folder of plain weights in `dtype`, planned alike by every process.

    `tied`: the head is left out, since it is the embedding.
    """

    def __init__(
        self, folder: Path, args: ModelArgs, *, dtype: torch.dtype, tied: bool, largest_file: int = _LARGEST_FILE
    ) -> None:
        """Raises ValueError if Hugging Face's config has no words for the model."""
        self._config = describe(args, dtype=str(dtype).removeprefix("torch."), tied=tied)
        self._folder = folder
        self._dtype = dtype
        self._head_dim = args.head_dim
        shapes = {weight: shape for weight, shape in hf_shapes(args).items() if not (tied and weight == "output")}
        self._shapes = shapes
        groups = _groups({weight: math.prod(shape) * dtype.itemsize for weight, shape in shapes.items()}, largest_file)
        count = len(groups)
        names = [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
        self._files = dict(zip(names if count > 1 else ["model.safetensors"], groups, strict=True))
        self._heads = {file: self._head(weights) for file, weights in self._files.items()}

    def reserve(self) -> None:
        """Write all files in full size, with room where the values will stand: by one process."""
        for file, weights in self._files.items():
            with (self._folder / file).open("wb") as stream:
                stream.write(self._heads[file])
                # Not later, when one of several processes would find the disk full.
                os.posix_fallocate(stream.fileno(), 0, len(self._heads[file]) + sum(map(self._nbytes, weights)))
        if len(self._files) > 1:
            listed = {_stored(weight): file for file, weights in self._files.items() for weight in weights}
            index = {"metadata": {"total_size": sum(map(self._nbytes, self._shapes))}, "weight_map": listed}
            self._write_json("model.safetensors.index.json", index)

    def fill(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        """Write the values of the parameters `names`, at rest as `read` gives them, into the files of `reserve`.

        Several processes may do this at once, each for names of its own.
        """
        places = {}
        for file, weights in self._files.items():
            at = len(self._heads[file])
            for weight in weights:
                places[f"{weight}.weight"] = (file, at)
                at += self._nbytes(weight)
        for name in names:
            if name in places:
                file, at = places[name]
                with (self._folder / file).open("rb+") as stream:
                    stream.seek(at)
                    values = self._laid_out(name.removesuffix(".weight"), read(name))
                    stream.write(values.view(torch.uint8).numpy().data)

    def write_config(self, tokenizer: Tokenizer | None = None) -> None:
        """Write `config.json`, with the tokenizer's ids that begin and end a text."""
        ids: dict[str, Any] = {}
        if tokenizer is not None:
            ends = sorted(tokenizer.eos_ids)
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
        self._write_json(CONFIG_FILE, self._config | ids)

    def _laid_out(self, weight: str, values: torch.Tensor) -> torch.Tensor:
        values = values.reshape(self._shapes[weight]).to(self._dtype)
        return (halves_from_pairs(values, self._head_dim) if is_rotated(weight) else values).contiguous()

    def _head(self, weights: Iterable[str]) -> bytes:
        """What stands before the values."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for weight in weights:
            end = at + self._nbytes(weight)
            described[_stored(weight)] = {
                "dtype": _CODES[self._dtype],
                "shape": self._shapes[weight],
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return struct.pack("<Q", len(text)) + text

    def _nbytes(self, weight: str) -> int:
        return math.prod(self._shapes[weight]) * self._dtype.itemsize

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _stored(weight: str) -> str:
    return f"{hf_name(weight)}.weight"


def _groups(sizes: dict[str, int], largest: int) -> list[list[str]]:
    """The names in their order, cut so that no group is larger than `largest`, unless it is one name."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = largest
        groups[-1].append(name)
        room -= size
    return groups
