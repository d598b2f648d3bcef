"""Owns encoding and decoding, with either kind of vocabulary file.

Knows no model, no chat format and no torch. `text_stream` decodes token by token and finds stop strings.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llama2.text.text_stream import TextStream
from llama2.text.tokenizer_files import (
    ADDED_FILE,
    BPE_FILE,
    CONFIG_FILE,
    GENERATION_FILE,
    SENTENCEPIECE_FILE,
    WORD_START,
    BpeDefinition,
    adds_tokens,
    read_config,
    read_json,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Special tokens that end a text or a turn in the Llama-shaped families, whatever `eos_token` says.
_TEXT_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a SentencePiece `tokenizer.model` or a `tokenizer.json`; `path` is the file or its folder.

    If a folder has both, `tokenizer.model` is read: it is the authority for Llama 2. But where `tokenizer.json` has
    tokens that were added to it later, that is read, since only there the vocabulary is whole.

    Raises:
        ValueError: there is no such file, or it is not a tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, BPE_FILE) if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has no tokenizer: expected {SENTENCEPIECE_FILE} or {BPE_FILE} in it")
        path = found[-1] if len(found) == 2 and adds_tokens(found[1]) else found[0]
    if not path.is_file():
        there = [name for name in (SENTENCEPIECE_FILE, BPE_FILE) if path.with_name(name).exists()]
        hint = f"there is a {there[0]}" if there else f"expected a {SENTENCEPIECE_FILE} or {BPE_FILE}"
        raise ValueError(f"tokenizer {path} does not exist: {hint}")
    if path.suffix == ".json":
        return BpeTokenizer(path)
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    raise ValueError(f"tokenizer {path} is of no known kind: expected a {SENTENCEPIECE_FILE} or {BPE_FILE}")


class Tokenizer(ABC):
    """What both kinds share. Special tokens exist only as ids: spelled out in a text, they are plain text.

    `eos_ids` are all ids that end a text or a turn. `chat_template` is the model's own Jinja template and
    `template_variables` the names it may use (`bos_token`, ...). `files` must be copied together.
    """

    def __init__(
        self,
        *,
        path: Path,
        pieces: list[bytes],
        special_tokens: Mapping[str, int],
        names: Mapping[str, str],
        adds_bos: bool,
        word_starts: frozenset[int],
    ) -> None:
        """`pieces` are the bytes of every id; `word_starts` the ids whose space is dropped at the start of a text.

        `names` are `bos_token` and others according to the vocabulary file. A `tokenizer_config.json` beside it
        overrides them and `add_bos_token`, and contains the chat template; a `generation_config.json` has more ids that
        end a text.
        """
        config, extra_files = read_config(path.parent)
        # Some write "" for a token that they do not name.
        named = {
            key: value for key, value in config.items() if key.endswith("_token") and value and isinstance(value, str)
        }
        self.files: tuple[Path, ...] = (path, *extra_files)
        self.vocab_size = len(pieces)
        self.special_tokens = special_tokens
        self.template_variables: Mapping[str, str] = {**names, **named}
        self.bos_id = self._named_id("bos_token")
        self.eos_id = self._named_id("eos_token")
        for token_id in config["eos_ids"]:
            if token_id >= len(pieces):
                raise ValueError(
                    f"{path.parent / GENERATION_FILE}: eos_token_id must be below {len(pieces)}, the number of ids in "
                    f"{path.name}, got {token_id}"
                )
        ends = {self.eos_id, *config["eos_ids"], *(special_tokens.get(piece) for piece in _TEXT_ENDS)}
        self.eos_ids = frozenset(token_id for token_id in ends if token_id is not None)
        self.chat_template: str | None = config.get("chat_template")
        self._pieces = pieces
        self._adds_bos = bool(config.get("add_bos_token", adds_bos))
        self._word_starts = word_starts

    @abstractmethod
    def _encode(self, text: str, after_special: bool) -> list[int]: ...

    def _kept(self, text: str) -> bytes:
        """What is left of `text` for tokens to write, or less."""
        return text.encode()

    @abstractmethod
    def text_decoder(self) -> codecs.IncrementalDecoder:
        """A fresh UTF-8 decoder that shows broken bytes as this kind of tokenizer does."""

    def encode(self, text: str, *, after_special: bool = False) -> list[int]:
        """The ids of `text`, without BOS. `after_special`: a special token precedes it in the prompt.

        Raises:
            ValueError: the text is not valid Unicode (JSON can carry a lone surrogate).
        """
        _check_unicode(text)
        return self._encode(text, after_special)

    def fewest_tokens(self, text: str) -> int:
        """What `len(encode(text))` is at least: as if every token were the longest, found in a fraction of the time.

        Raises:
            ValueError: as `encode`.
        """
        _check_unicode(text)
        return -(-len(self._kept(text).translate(None, self._unknown_bytes)) // self._longest)

    def encode_prompt(self, text: str) -> list[int]:
        """`encode`, after BOS where the model was trained with one."""
        ids = self.encode(text)
        return [self.bos_id, *ids] if self._adds_bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` alone; special tokens are skipped."""
        stream = TextStream(self, continues_prompt=False)
        return "".join(map(stream.push, ids)) + stream.finish()

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """What the token adds to a text: b"" for special tokens and for ids that the vocabulary does not have.

        `first`: nothing precedes it, so the space that SentencePiece puts before a first word is dropped.
        """
        piece = self._pieces[token_id] if 0 <= token_id < self.vocab_size else b""
        return piece[1:] if first and token_id in self._word_starts else piece

    def spell(self, data: bytes) -> list[int]:
        """The ids of `data`, one for each character or each of its bytes: never a piece that joins characters."""
        ids = []
        for character in data.decode(errors="surrogateescape"):
            single = character.encode(errors="surrogateescape")
            whole = self._single_ids.get(single)
            ids += [whole] if whole is not None else [self._single_ids[bytes([byte])] for byte in single]
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """`text` split at the special tokens that it spells, with their ids in place of them.

        This is for what a model's own template wrote. In a user's text they stay text.
        """
        runs: list[str | int] = []
        start = 0
        for match in self._special_pattern.finditer(text):
            runs += [text[start : match.start()], self.special_tokens[match[match.lastindex or 0]]]
            start = match.end()
        return [run for run in [*runs, text[start:]] if run != ""]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(self._special_regex, longest_first)) or "(?!)")

    def _special_regex(self, piece: str) -> str:
        """Matches the special token, with its spelling in one group."""
        return f"({re.escape(piece)})"

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._pieces))

    @cached_property
    def _unknown_bytes(self) -> bytes:
        """Those without an id of their own, which may be left out or joined."""
        return bytes(byte for byte in range(256) if bytes([byte]) not in self._single_ids)

    @cached_property
    def _single_ids(self) -> dict[bytes, int]:
        # SentencePiece's byte pieces have the lowest ids: a later piece of the same bytes is the real character.
        return {piece: token_id for token_id, piece in enumerate(self._pieces) if _is_single(piece)}

    def _named_id(self, name: str) -> int | None:
        """The id of `bos_token` and the like, None where the model has none."""
        piece = self.template_variables.get(name)
        if piece is None:
            return None
        if piece not in self.special_tokens:
            raise ValueError(
                f"{self.files[0]} has no special token {piece!r}, which {CONFIG_FILE} calls its {name}"
                f" (a vocabulary with added tokens is whole only in {BPE_FILE})"
            )
        return self.special_tokens[piece]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `tokenizer.model`, Llama 2's own kind."""

    def __init__(self, path: Path) -> None:
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
            ids = range(self._model.vocab_size())
            spellings = [self._model.id_to_piece(i) for i in ids]
            pieces = [self._bytes_of(i, spelling) for i, spelling in enumerate(spellings)]
        except (OSError, RuntimeError, ValueError):
            raise ValueError(f"{path} is not a SentencePiece model: expected Llama 2's {SENTENCEPIECE_FILE}") from None
        added = read_json(path.parent / ADDED_FILE) if (path.parent / ADDED_FILE).is_file() else {}
        if any(not isinstance(index, int) or index >= len(pieces) for index in added.values()):
            raise ValueError(
                f"{path} lacks tokens of {ADDED_FILE}: expected a {BPE_FILE} beside it, where the vocabulary is whole"
            )
        model = self._model
        names = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        super().__init__(
            path=path,
            pieces=pieces,
            special_tokens={spellings[i]: i for i in ids if model.is_control(i) or model.is_unknown(i)},
            names={name: spellings[index] for name, index in names.items() if index >= 0},
            adds_bos=True,
            word_starts=self._word_starts_of(spellings, pieces),
        )

    def _bytes_of(self, index: int, spelling: str) -> bytes:
        if self._model.is_control(index):
            return b""
        if self._model.is_unknown(index):
            return self._model.decode([index]).encode()
        if self._model.is_byte(index):
            return bytes.fromhex(spelling.removeprefix("<0x").removesuffix(">"))
        return spelling.replace(WORD_START, " ").encode()

    def _word_starts_of(self, spellings: list[str], pieces: list[bytes]) -> frozenset[int]:
        starts = [index for index, spelling in enumerate(spellings) if spelling.startswith(WORD_START)]
        drops = starts and self._model.decode(starts[:1]) != pieces[starts[0]].decode()
        return frozenset(starts if drops else ())

    def _encode(self, text: str, after_special: bool) -> list[int]:
        return self._model.encode(text)

    def _kept(self, text: str) -> bytes:
        return self._model.normalize(text).replace(WORD_START, " ").encode()

    def text_decoder(self) -> codecs.IncrementalDecoder:
        return _EachByteDecoder()


class BpeTokenizer(Tokenizer):
    """A `tokenizer.json` with a BPE model: byte-level as GPT-2's, or with word starts and byte pieces as Llama 2's."""

    def __init__(self, path: Path) -> None:
        definition = BpeDefinition.read(path)
        self._byte_level = definition.byte_level
        self._tokenizer = definition.build()
        self._keeps_text = definition.keeps_text
        self._inner = definition.build(mark_first_word=False) if definition.marks_first_word_only else self._tokenizer
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._added = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        special = {piece: vocabulary[piece] for piece, token in self._added.items() if token.special}
        size = max(vocabulary.values(), default=-1) + 1
        if not 0 < size <= 2 * len(vocabulary):
            raise ValueError(
                f"{path}: {len(vocabulary)} pieces must have ids from 0 up without wide gaps, got {size - 1}"
            )
        pieces = [b""] * size
        for piece, index in vocabulary.items():
            if piece not in special:
                pieces[index] = piece.encode() if piece in self._added else definition.piece_bytes(piece)
        # The file's post-processor puts BOS before a text if the model has one.
        bos = [piece for piece in self._tokenizer.encode("a").tokens[:1] if piece in special]
        super().__init__(
            path=path,
            pieces=pieces,
            special_tokens=special,
            names={"bos_token": bos[0]} if bos else {},
            adds_bos=bool(bos),
            word_starts=frozenset(
                i for i, piece in enumerate(pieces) if definition.drops_first_space and piece.startswith(b" ")
            ),
        )

    def _encode(self, text: str, after_special: bool) -> list[int]:
        # A batch of one: alone, a text is encoded without letting other threads run, for seconds if it is long.
        tokenizer = self._inner if after_special else self._tokenizer
        return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _kept(self, text: str) -> bytes:
        return text.encode() if self._keeps_text else b""

    def _special_regex(self, piece: str) -> str:
        # Some special tokens swallow the white space beside them.
        token = self._added[piece]
        return (r"\s*" if token.lstrip else "") + f"({re.escape(piece)})" + (r"\s*" if token.rstrip else "")

    def text_decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8")("replace") if self._byte_level else _EachByteDecoder()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: lone surrogate at character {error.start}") from None


def _is_single(piece: bytes) -> bool:
    """Is this one byte, or one whole character?"""
    try:
        return len(piece) == 1 or len(piece.decode()) == 1
    except UnicodeDecodeError:
        return False


class _EachByteDecoder(codecs.IncrementalDecoder):
    """UTF-8 with one U+FFFD for each byte that belongs to no character, as SentencePiece decodes."""

    def __init__(self) -> None:
        super().__init__()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def decode(self, data: ReadableBuffer, final: bool = False) -> str:
        return _ESCAPED_BYTE.sub("\N{REPLACEMENT CHARACTER}", self._utf8.decode(data, final))
