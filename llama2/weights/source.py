"""Owns the way from a path to a model that can be converted: which reader it belongs to, and its tokenizer.

Knows nothing of what becomes of either. A reader for another kind of files is a module of `readers`, and a case here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llama2.text.tokenizer import BPE_FILE, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from llama2.weights.kinds import check_source
from llama2.weights.readers import Reader
from llama2.weights.readers.dcp import METADATA_FILE, DcpFolder
from llama2.weights.readers.fairscale import FairscaleFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model to convert. `write_tokenizer` puts the tokenizer's files into a folder."""

    reader: Reader
    write_tokenizer: Callable[[Path], None]


def open_source(path: Path | str, *, tokenizer_path: Path | str | None = None, num_shards: int | None = None) -> Source:
    """Open Meta's folder, a converted one, or a GGUF file.

    Args:
        tokenizer_path: `tokenizer.model`, `tokenizer.json`, or their folder; None: the source's own.
        num_shards: how many shards Meta's folder must have; None: as many as there are.

    Raises:
        ValueError: one line that says what is wrong with it.
    """
    path = Path(path)
    check_source(path)
    is_file, is_converted = path.is_file(), (path / METADATA_FILE).exists()
    if num_shards is not None and (is_file or is_converted):
        kind = "a file" if is_file else "a converted checkpoint"
        raise ValueError(f"model_parallel_size counts Meta's shards, and {path} is {kind}")
    if is_file:
        try:
            from llama2.weights.readers.gguf import GgufFile
        except ModuleNotFoundError as error:
            raise ValueError(f"{path}: GGUF files are not read without the package {error.name}") from None
        gguf = GgufFile(path)
        if tokenizer_path is None:
            gguf.check_tokenizer()
            return Source(reader=gguf, write_tokenizer=gguf.write_tokenizer)
        return Source(reader=gguf, write_tokenizer=_copier(load_tokenizer(tokenizer_path)))
    tokenizer = load_tokenizer(path if tokenizer_path is None else tokenizer_path)
    reader: Reader
    if is_converted:
        reader = DcpFolder(path)
    else:
        reader = FairscaleFolder(path, vocab_size=tokenizer.vocab_size, num_shards=num_shards)
    return Source(reader=reader, write_tokenizer=_copier(tokenizer))


def _copier(tokenizer: Tokenizer) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        main, *others = tokenizer.files
        shutil.copyfile(main, folder / (BPE_FILE if main.suffix == ".json" else SENTENCEPIECE_FILE))
        for file in others:
            shutil.copyfile(file, folder / file.name)

    return copy
