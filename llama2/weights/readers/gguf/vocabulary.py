"""Owns what both kinds of tokenizer have in the metadata of a GGUF file: pieces, their types, and named ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf.constants import TokenType

from llama2.weights.readers.gguf.metadata import Metadata

# The names of ids, and llama.cpp's words for them. A turn or a message may end otherwise than a text.
_NAMES = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
ENDS = ("eos", "eot", "eom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Pieces as the file spells them, and the type of each. `named` are ids by `bos`, `eos` and others."""

    pieces: list[str]
    types: list[TokenType]
    named: Mapping[str, int]

    @classmethod
    def read(cls, metadata: Metadata) -> Vocabulary:
        """The vocabulary, in which the tokens that begin and end a text are special.

        Raises:
            ValueError: it is damaged; the message names the file and the key.
        """
        pieces = metadata.strings("tokenizer.ggml.tokens")
        if "tokenizer.ggml.token_type" in metadata:
            types = metadata.numbers("tokenizer.ggml.token_type").tolist()
        else:
            types = [TokenType.NORMAL] * len(pieces)
        if len(types) != len(pieces):
            raise ValueError(f"{metadata.path}: tokenizer.ggml.token_type has {len(types)} of {len(pieces)} pieces")
        try:
            types = list(map(TokenType, types))
        except ValueError as error:
            raise ValueError(f"{metadata.path}: tokenizer.ggml.token_type: {error}") from None
        named = {}
        for name, word in _NAMES.items():
            key = f"tokenizer.ggml.{word}_token_id"
            if key not in metadata:
                continue
            index = metadata.get(key, int)
            if not 0 <= index < len(pieces):
                raise ValueError(f"{metadata.path}: {key} must be less than {len(pieces)}, the pieces, got {index}")
            named[name] = index
            if name in ("bos", *ENDS) and types[index] != TokenType.UNKNOWN:
                types[index] = TokenType.CONTROL
        return cls(pieces=pieces, types=types, named=named)
