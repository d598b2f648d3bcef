"""Owns the way from a path to a model that can be converted: which reader it belongs to, and its tokenizer.

Knows nothing of what becomes of either. A reader for another kind of files is a module of `readers`, and a case here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llama2.text.tokenizer import BPE_FILE, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from llama2.weights.kinds import Kind, check_source
from llama2.weights.origin import Origin, extended, read_origin
from llama2.weights.readers import Reader
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import FairscaleFolder
from llama2.weights.readers.hugging_face import open_hugging_face


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to convert. `write_tokenizer` puts the tokenizer's files into a folder.

    `notes` say, a line each, what the reader does not hold as it is stored. `origin` ends with the precisions of its
    files. `hidden_orders` are those of `HuggingFaceFolder`.
    """

    reader: Reader
    write_tokenizer: Callable[[Path], None]
    origin: Origin
    notes: Sequence[str] = ()
    hidden_orders: Mapping[str, torch.Tensor] = field(default_factory=dict)


def open_source(path: Path | str, *, tokenizer_path: Path | str | None = None, num_shards: int | None = None) -> Source:
    """Open Meta's folder, Hugging Face's, a converted one, or a file: GGUF, or safetensors with its config beside it.

    Args:
        tokenizer_path: `tokenizer.model`, `tokenizer.json`, or their folder; None: the source's own.
        num_shards: how many shards Meta's folder must have; None: as many as there are.

    Raises:
        ValueError: one line that says what is wrong with it.
    """
    path = Path(path)
    kind = check_source(path)
    if num_shards is not None and kind is not Kind.META:
        raise ValueError(f"--model_parallel_size counts Meta's shards, and {path} {kind.value}")
    if kind is Kind.GGUF:
        # gguf and its tokenizers take a moment to import, which nobody else shall wait for.
        from llama2.weights.readers.gguf.file import GgufFile

        gguf = GgufFile(path)
        origin: Origin = (gguf.spec.stored(gguf.precisions),)
        if tokenizer_path is None:
            gguf.check_tokenizer()
            return Source(reader=gguf, write_tokenizer=gguf.write_tokenizer, origin=origin, notes=gguf.notes)
        tokenizer = load_tokenizer(tokenizer_path)
        _check_belongs(tokenizer, path, gguf)
        return Source(reader=gguf, write_tokenizer=_copier(tokenizer), origin=origin, notes=gguf.notes)
    folder = path.parent if path.is_file() else path
    tokenizer = load_tokenizer(folder if tokenizer_path is None else tokenizer_path)
    reader: Reader
    notes: Sequence[str] = ()
    precisions: Mapping[str, str] = {}
    hidden_orders: Mapping[str, torch.Tensor] = {}
    if kind is Kind.CONVERTED:
        reader = DcpFolder(path)
    elif kind is Kind.META:
        reader = FairscaleFolder(path, vocab_size=tokenizer.vocab_size, num_shards=num_shards)
    else:
        reader = open_hugging_face(path)
        _check_belongs(tokenizer, path, reader)
        notes, precisions, hidden_orders = reader.notes, reader.precisions, reader.hidden_orders
    origin = extended(read_origin(folder), reader.spec.stored(precisions))
    return Source(
        reader=reader,
        write_tokenizer=_copier(tokenizer),
        origin=origin,
        notes=notes,
        hidden_orders=hidden_orders,
    )


def _check_belongs(tokenizer: Tokenizer, path: Path, reader: Reader) -> None:
    vocab_size = reader.spec.args.vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, but the model only {vocab_size}: they do not "
            "belong together"
        )


def _copier(tokenizer: Tokenizer) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        main, *others = tokenizer.files
        shutil.copyfile(main, folder / (BPE_FILE if main.suffix == ".json" else SENTENCEPIECE_FILE))
        for file in others:
            shutil.copyfile(file, folder / file.name)

    return copy
