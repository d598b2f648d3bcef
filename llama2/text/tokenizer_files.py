"""Owns what the JSON files of a tokenizer say: `tokenizer.json`'s definition, and the files beside it.

Knows no SentencePiece and encodes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

SENTENCEPIECE_FILE = "tokenizer.model"
BPE_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
# The first one that is there counts, and either counts more than the template in the config.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
ADDED_FILE = "added_tokens.json"

_LARGEST_JSON = 16 << 20

WORD_START = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip"}
# Steps before the merges that add to a text at most, or write one character as another.
_KEEPING_STEPS = {"Prepend", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"}
_MARK_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}


@dataclass(frozen=True, slots=True, kw_only=True)
class BpeDefinition:
    """A `tokenizer.json` with a BPE model: byte-level as GPT-2's, or with word starts and byte pieces as Llama 2's.

    `drops_first_space`: its decoder drops the space at the start of a text.
    """

    path: Path
    content: dict[str, Any]
    byte_level: bool
    drops_first_space: bool

    @classmethod
    def read(cls, path: Path) -> BpeDefinition:
        """Read the file, and make sure that plain text cannot become a special token.

        Raises:
            ValueError: it is not such a file, or its model or decoder is of another kind.
        """
        content = read_json(path)
        try:
            special = {token["content"] for token in content["added_tokens"] if token["special"]}
            decoder = content["decoder"]
            kinds = {part["type"] for part in decoder.get("decoders", [decoder])}
            # A merge that spells a special token would turn text into one.
            merges = [merge for merge in content["model"]["merges"] if _merged(merge) not in special]
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"{path} is not a {BPE_FILE} of the tokenizers library with a BPE model") from None
        byte_level = kinds == {"ByteLevel"}
        if not byte_level and not {"Replace", "ByteFallback"} <= kinds <= _WORD_DECODERS:
            raise ValueError(
                f"{path}: decoder {' + '.join(sorted(kinds))} is not supported, only ByteLevel (GPT-2's) and"
                " Replace + ByteFallback (Llama 2's)"
            )
        content["model"]["merges"] = merges
        return cls(path=path, content=content, byte_level=byte_level, drops_first_space="Strip" in kinds)

    @property
    def marks_first_word_only(self) -> bool:
        """Is a word start added to a text, but not after a special token?"""
        return (self.content.get("pre_tokenizer") or {}).get("prepend_scheme") == "first"

    @property
    def keeps_text(self) -> bool:
        """Do all characters of a text come to the merges, none left out and no two as one?"""
        stages = [self.content.get(name) or {"type": "Sequence"} for name in ("normalizer", "pre_tokenizer")]
        steps = [
            step
            for stage in stages
            for step in (
                stage.get("normalizers", stage.get("pretokenizers", ())) if stage["type"] == "Sequence" else [stage]
            )
        ]
        kept = all(
            step == _MARK_SPACES or (step["type"] in _KEEPING_STEPS and step.get("behavior") != "Removed")
            for step in steps
        )
        strips = any(token.get("lstrip") or token.get("rstrip") for token in self.content["added_tokens"])
        return kept and not strips

    def build(self, *, mark_first_word: bool = True) -> tokenizers.Tokenizer:
        """A tokenizer that reads special tokens inside a text as plain text, and neither truncates nor pads."""
        import tokenizers

        content = self.content
        if not mark_first_word:
            content = content | {"pre_tokenizer": content["pre_tokenizer"] | {"prepend_scheme": "never"}}
        try:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # the library has no exception class
            raise ValueError(f"{self.path} is not a {BPE_FILE} that the tokenizers library reads: {error}") from None
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def piece_bytes(self, piece: str) -> bytes:
        """The bytes of a piece of the vocabulary."""
        if self.byte_level:
            # A piece with any other character stands for itself, in the tokenizers library too.
            known = all(character in _BYTE_ALPHABET for character in piece)
            return bytes(_BYTE_ALPHABET[character] for character in piece) if known else piece.encode()
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(WORD_START, " ").encode()


def adds_tokens(path: Path) -> bool:
    """Has a `tokenizer.json` tokens beyond the pieces of its model, of which a `tokenizer.model` knows nothing?"""
    content = read_json(path)
    try:
        return any(token["id"] >= len(content["model"]["vocab"]) for token in content["added_tokens"])
    except (KeyError, TypeError):
        return False


def read_config(folder: Path) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """`tokenizer_config.json`, with tokens as strings and the chat template in place; and the files that were read.

    `eos_ids` has the ids of `generation_config.json` that end a text. All are empty where there is no such file.

    Raises:
        ValueError: a file is not JSON, its chat template is not a string, or its ids are none.
    """
    names = (CONFIG_FILE, *TEMPLATE_FILES, GENERATION_FILE)
    files = {name: folder / name for name in names if (folder / name).is_file()}
    config = read_json(files[CONFIG_FILE]) if CONFIG_FILE in files else {}
    # A token is a string, or an object with a "content" beside flags.
    config = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    config["chat_template"] = _chat_template(config.get("chat_template"), files)
    config["eos_ids"] = _eos_ids(files[GENERATION_FILE]) if GENERATION_FILE in files else []
    return config, tuple(files.values())


def _chat_template(of_config: Any, files: Mapping[str, Path]) -> str | None:
    path = next((files[name] for name in TEMPLATE_FILES if name in files), files.get(CONFIG_FILE))
    template = of_config
    if path is not None and path.suffix == ".jinja":
        template = _read_text(path)
    elif path is not None and path.name in TEMPLATE_FILES:
        template = read_json(path).get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(f"{path}: chat_template must be a string, got {type(template).__name__}")
    return template


def _eos_ids(path: Path) -> list[int]:
    ids = read_json(path).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in ids):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, got {ids!r}")
    return ids


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_small_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that has no reason to be large.

    Raises:
        ValueError: it cannot be read, is large, or holds something else.
    """
    if path.is_file() and path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, which is no file of that name")
    return read_json(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None


def _merged(merge: str | list[str]) -> str:
    """The piece that a merge makes. Older files write "a b", newer ones ["a", "b"]."""
    return "".join(merge.split(" ") if isinstance(merge, str) else merge)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's encoder.py, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()
