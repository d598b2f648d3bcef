"""Owns a GGUF file of the Llama architecture as a source of weights. Knows no other checkpoint format."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch

from llama2.config import ModelArgs
from llama2.weights.formats import Format
from llama2.weights.formats.groups import repeated
from llama2.weights.readers import Chunk, check_layers, note_of_plain, whole
from llama2.weights.readers.gguf.architecture import ROPE_DIVISORS, read_args
from llama2.weights.readers.gguf.blocks import Type, check_type, format_of, plain_dtype, read_part, read_values
from llama2.weights.readers.gguf.header import StoredTensor
from llama2.weights.readers.gguf.parts import read_parts
from llama2.weights.readers.gguf.tokenizer import read_tokenizer
from llama2.weights.spec import Spec, fitting

_NAMES_OF_WHOLE = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
_NAMES_OF_LAYER = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


class GgufFile:
    """A GGUF file, or all of those that a model was split over, opened by mmap.

    Attributes:
        spec: all tensors. A type that no format holds exactly is dequantized to bf16.
    """

    def __init__(self, path: Path | str) -> None:
        """Read the metadata and compare the list of tensors with it.

        Raises:
            ValueError: the file is no whole GGUF file, or no model that this project can run.
        """
        self.path = Path(path)
        header = read_parts(self.path)
        self._metadata, self._tensors = header.metadata, header.tensors
        args = read_args(self._metadata, self._tensors)
        self._check_tensors(args)
        self.spec = self._read_spec(args)
        self._at_rest = self.spec.tensors()

    @property
    def precisions(self) -> dict[str, str]:
        """The type of each weight in the file, by the weight's name."""
        return {name: self._stored(name).type.name for name in self.spec.args.weight_axes()}

    @property
    def notes(self) -> list[str]:
        """What is not held as it is stored, in a line for each type."""
        changed: defaultdict[Type, list[str]] = defaultdict(list)
        for name, axes in self.spec.args.weight_axes().items():
            kind = self._stored(name).type
            if axes.inputs and name not in self.spec.formats and plain_dtype(kind) != self.spec.dtype:
                changed[kind].append(name)
        notes = []
        for kind, names in changed.items():
            stored = sum(self._tensors[name].data.nbytes for name in {self._stored_name(name) for name in names})
            nbytes = sum(self._at_rest[f"{name}.weight"].nbytes for name in names)
            notes.append(note_of_plain(names, kind.name, self.spec.dtype, nbytes=nbytes, stored=stored))
        return notes

    def read(self, name: str) -> torch.Tensor:
        """Tensor `name`, at rest.

        GGUF holds wq and wk with the pairs of the rotary embedding side by side, as Meta's own files do.
        """
        weight, _, part = name.rpartition(".")
        stored, tensor = self._stored(weight), self._at_rest[name]
        if weight in self.spec.formats:
            return repeated(read_part(stored.data, stored.type, part), tensor.shape).view(tensor.shape)
        return read_values(stored.data, stored.type, tensor.dtype).view(tensor.shape)

    def chunks(self, name: str) -> list[Chunk]:
        return whole(self, name, self._at_rest[name].shape)

    def check_tokenizer(self) -> None:
        """Raises ValueError if there is no tokenizer in the metadata, or it is damaged or of a kind not known here."""
        self._read_tokenizer()

    def write_tokenizer(self, folder: Path | str) -> None:
        """Write the tokenizer's files as the libraries that own their formats read them.

        Raises:
            ValueError: as `check_tokenizer`.
        """
        for name, content in self._read_tokenizer().items():
            (Path(folder) / name).write_bytes(content)

    def _read_tokenizer(self) -> Mapping[str, bytes]:
        return read_tokenizer(self._metadata, vocab_size=self.spec.args.vocab_size)

    def _read_spec(self, args: ModelArgs) -> Spec:
        types = {name: self._stored(name).type for name, axes in args.weight_axes().items() if axes.inputs}
        # Where all are alike they stay so; beside others every plain one is bf16.
        dtypes = {plain_dtype(kind) or torch.bfloat16 for kind in types.values()}
        formats: dict[str, Format] = {}
        for name, kind in types.items():
            format = format_of(kind)
            # Where heads and groups of no size go into one another, the weight becomes plain.
            with contextlib.suppress(ValueError):
                formats |= {name: fitting(format, name, args)} if format else {}
        return Spec(args=args, dtype=dtypes.pop() if len(dtypes) == 1 else torch.bfloat16, formats=formats)

    def _stored(self, weight: str) -> StoredTensor:
        return self._tensors[self._stored_name(weight)]

    def _stored_name(self, weight: str) -> str:
        if weight.startswith("layers."):
            _, index, rest = weight.split(".", 2)
            return f"blk.{index}.{_NAMES_OF_LAYER[rest]}.weight"
        tied = weight == "output" and "output.weight" not in self._tensors
        return f"{_NAMES_OF_WHOLE['tok_embeddings' if tied else weight]}.weight"

    def _check_tensors(self, args: ModelArgs) -> None:
        check_layers(args, self._tensors, "the metadata", self.path)
        sizes = args.axis_sizes
        wanted = {
            self._stored_name(name): tuple(math.prod(sizes[axis] for axis in each) for each in axes if each)
            for name, axes in args.weight_axes().items()
        }
        for name in sorted(wanted.keys() ^ (self._tensors.keys() - {ROPE_DIVISORS})):
            what = "is missing" if name in wanted else "is not part of a Llama model"
            raise ValueError(f"{self.path}: tensor {name!r} {what}")
        for name, shape in wanted.items():
            stored = self._tensors[name]
            if stored.shape != shape:
                raise ValueError(
                    f"{self.path}: tensor {name!r} has the shape {stored.shape}, and by the metadata it is {shape}"
                )
            check_type(stored.type, f"{self.path}: tensor {name!r}")
