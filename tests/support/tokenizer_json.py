"""Writes `tokenizer.json` files of both kinds: SmolLM2's, byte-level, and a SentencePiece model converted."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges

if TYPE_CHECKING:
    from llama2.weights.readers.gguf.file import GgufFile


def llama_tokenizer_json(folder: Path, sentencepiece_file: Path, *, legacy: bool) -> Path:
    """Convert a `tokenizer.model` as transformers does: `folder/tokenizer.json` and its config.

    `legacy` is the conversion that puts a word start before every stretch of text, not only before the first.
    """
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    pieces = [model.id_to_piece(index) for index in range(model.vocab_size())]
    scores = {piece: model.get_score(index) for index, piece in enumerate(pieces)}
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(vocabulary, scores), legacy=legacy)
    tokenizer.save_pretrained(folder)
    return Path(folder) / "tokenizer.json"


def smollm2_tokenizer(folder: Path) -> Path:
    """Write SmolLM2's byte-level `folder/tokenizer.json` and its config, with a ChatML template."""
    _smollm2().write_tokenizer(folder)
    return Path(folder) / "tokenizer.json"


@cache
def _smollm2() -> GgufFile:
    # Imported only where the demo's model is used: every test of the package imports this file.
    from llama2.weights.readers.gguf.file import GgufFile
    from scripts.smollm2 import gguf_file

    return GgufFile(gguf_file())
