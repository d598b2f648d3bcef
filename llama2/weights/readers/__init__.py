"""Owns what every reader of weights gives, whatever its files. A reader is a module here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from llama2.config import ModelArgs
from llama2.weights.spec import Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One rectangular piece of a tensor at rest. Its values are read when `read` is called, or when they are used."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class Reader(Protocol):
    """Weights in files, opened and checked, of which nothing large is read yet. All names are Meta's.

    `spec` says which tensors there are (`Spec.tensors`), and so which formats the weights have.
    """

    path: Path
    spec: Spec

    def read(self, name: str) -> torch.Tensor:
        """A tensor whole, at rest: mapped from a file, or in memory.

        Raises:
            ValueError: its values are missing or damaged.
        """

    def chunks(self, name: str) -> list[Chunk]:
        """The same in the pieces that it is stored in; together they tile it."""


def whole(reader: Reader, name: str, shape: tuple[int, ...]) -> list[Chunk]:
    """A tensor of `shape` that is stored in one piece, or has to be put together."""
    return [Chunk(name=name, offsets=(0,) * len(shape), shape=shape, read=lambda: reader.read(name))]


def note_of_plain(names: Sequence[str], kind: str, dtype: torch.dtype, *, nbytes: int, stored: int) -> str:
    """A line for the user: which weights of a kind become plain, and what they take then and as they are `stored`."""
    weights, becomes = (f"{len(names)} weights", "become") if len(names) > 1 else (names[0], "becomes")
    shown = str(dtype).removeprefix("torch.")
    return f"{weights} in {kind} {becomes} {shown}, {nbytes / 1e6:,.1f} MB instead of {stored / 1e6:,.1f} MB"


def check_layers(args: ModelArgs, names: Iterable[str], said: str, path: Path) -> None:
    """Compare the number of layers that a file `said` with the names of the tensors in `path`.

    Before a list of all weights is made: a number that is far too large would take all memory.

    Raises:
        ValueError: they differ.
    """
    indices = (name.split(".")[1:2] for name in names)
    found = {index for (index,) in filter(None, indices) if index.isdecimal()}
    if args.n_layers != len(found):
        raise ValueError(f"{said} says n_layers={args.n_layers}, but {path} has tensors of {len(found)} layers")
