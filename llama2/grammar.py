"""Owns the mask of tokens that keeps a reply inside a grammar: a JSON schema, a regex, or a choice of texts.

The rules come from `syntax`, the masks from xgrammar, which is imported when the first grammar is asked for. Knows no
sampler: `engine.sequence` says what a grammar and a matcher are to it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.syntax import json_schema, regex
from llama2.syntax.charset import CharSet, as_ebnf
from llama2.tokenizer import Tokenizer

MAX_CHOICES = 1000
MAX_CHOICE_CHARACTERS = 20_000
_CACHED = 32
_THREADS = 4


class GrammarCompiler:
    """Makes grammars for one model's vocabulary, and remembers the latest.

    All of them raise ValueError for what is no grammar, or one that is too large: compiling takes a second at most.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the model's. It may be more than the tokenizer's: nothing is written with such ids."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._compiled = functools.lru_cache(maxsize=_CACHED)(self._compile)

    def json_schema(self, schema: dict[str, Any] | bool) -> CompiledGrammar:
        """A JSON value that follows the schema."""
        try:
            source = json.dumps(schema)
        except (TypeError, ValueError, RecursionError):
            raise ValueError("the schema is no JSON, or is nested too deep") from None
        return self._compiled(_schema_rules, source)

    def json_object(self) -> CompiledGrammar:
        """Any JSON object."""
        return self._compiled(_schema_rules, '{"type": "object"}')

    def regex(self, pattern: str) -> CompiledGrammar:
        """A text that the regular expression matches as a whole."""
        return self._compiled(_regex_rules, pattern)

    def choice(self, texts: list[str]) -> CompiledGrammar:
        """One of the texts."""
        if not texts or len(texts) > MAX_CHOICES or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"it must be a list of 1 to {MAX_CHOICES} texts")
        if sum(map(len, texts)) > MAX_CHOICE_CHARACTERS:
            raise ValueError(f"its texts must have at most {MAX_CHOICE_CHARACTERS} characters together")
        return self._compiled(_choice_rules, json.dumps(texts))

    def _compile(self, write: Callable[[str, CharSet], str], source: str) -> CompiledGrammar:
        vocabulary, compiler = self._vocabulary
        rules = write(source, vocabulary.alphabet)
        try:
            compiled = compiler.compile_grammar(rules)
        except RuntimeError as error:
            raise ValueError(f"xgrammar refuses it: {error}") from None
        return CompiledGrammar(compiled, vocabulary)

    @functools.cached_property
    def _vocabulary(self) -> tuple[_Vocabulary, Any]:
        try:
            import xgrammar
        except ImportError as error:
            raise ValueError(f"constrained output needs xgrammar, which is not installed ({error})") from None
        vocabulary = _Vocabulary.of(self._tokenizer, self._vocab_size)
        info = xgrammar.TokenizerInfo(
            list(vocabulary.pieces),
            xgrammar.VocabType.RAW,
            vocab_size=self._vocab_size,
            stop_token_ids=vocabulary.end_ids,
        )
        return vocabulary, xgrammar.GrammarCompiler(info, max_threads=_THREADS, cache_enabled=False)


class CompiledGrammar:
    """What a reply must look like: `Grammar` of `engine.sequence`."""

    def __init__(self, compiled: Any, vocabulary: _Vocabulary) -> None:
        self._compiled = compiled
        self._vocabulary = vocabulary

    def matcher(self, *, continues_prompt: bool = True) -> GrammarMatcher:
        """For one reply. `continues_prompt` as in `Request`: False for a text of its own, which drops the space that
        SentencePiece puts before a first word."""
        return GrammarMatcher(self._compiled, self._vocabulary, None if continues_prompt else self._first_mask_W)

    @functools.cached_property
    def _first_mask_W(self) -> Tensor:
        """The mask of the first token of a text of its own: where its space is dropped, the rest of it decides."""
        import xgrammar

        matcher = xgrammar.GrammarMatcher(self._compiled)
        mask = xgrammar.allocate_token_bitmask(1, self._vocabulary.size)
        matcher.fill_next_token_bitmask(mask)
        allowed_V = _unpack(mask[0])
        for token_id, rest in self._vocabulary.first_bytes.items():
            allowed_V[token_id] = False
            first_byte = self._vocabulary.byte_ids.get(rest[:1])
            if rest and (first_byte is None or allowed_V[first_byte]) and matcher.accept_string(rest):
                matcher.rollback(1)
                allowed_V[token_id] = True
        return _pack(allowed_V)


class GrammarMatcher:
    """One reply's way through a grammar: `Matcher` of `engine.sequence`."""

    def __init__(self, compiled: Any, vocabulary: _Vocabulary, first_mask_W: Tensor | None) -> None:
        """`first_mask_W`: what the first token may be, if that is not what the grammar says of its bytes."""
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary.size)
        self._vocabulary = vocabulary
        self._first_mask_W = first_mask_W
        self._over = False

    def mask_W(self) -> Tensor:
        """What can follow, as `Matcher` says it; where nothing can, the end of the reply still can."""
        if self._over:
            return self._vocabulary.ends_mask_W
        mask_W = self._first_mask_W
        if mask_W is None:
            self._matcher.fill_next_token_bitmask(self._mask)
            mask_W = self._mask[0]
        return mask_W if mask_W.any() else self._vocabulary.ends_mask_W

    def accept(self, token_id: int) -> None:
        if self._first_mask_W is not None and token_id in self._vocabulary.first_bytes:
            accepted = self._matcher.accept_string(self._vocabulary.first_bytes[token_id])
        else:
            accepted = self._matcher.accept_token(token_id)
        self._first_mask_W = None
        self._over = not accepted or self._matcher.is_terminated()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """What each id writes, b"" for special tokens and for ids that are only the model's.

    `alphabet` are the characters that can be written for sure; `byte_ids` the tokens of a single byte; `first_bytes`
    what those tokens write at the start of a text whose space is dropped there; `ends_mask_W` the mask of `end_ids`.
    """

    size: int
    pieces: tuple[bytes, ...]
    end_ids: list[int]
    alphabet: CharSet
    byte_ids: dict[bytes, int]
    first_bytes: dict[int, bytes]
    ends_mask_W: Tensor

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> _Vocabulary:
        end_ids = sorted(token_id for token_id in tokenizer.eos_ids if token_id < size)
        if not end_ids:
            raise ValueError("this model has no end-of-text token, so its replies cannot be held to a grammar")
        pieces = tuple(b"" if index in end_ids else tokenizer.token_bytes(index) for index in range(size))
        firsts = ((index, tokenizer.token_bytes(index, first=True)) for index in range(size))
        ends_V = torch.zeros(-(-size // 32) * 32, dtype=torch.bool)
        ends_V[end_ids] = True
        return cls(
            size=size,
            pieces=pieces,
            end_ids=end_ids,
            alphabet=_alphabet(pieces),
            byte_ids={piece: index for index, piece in enumerate(pieces) if len(piece) == 1},
            first_bytes={index: first for index, first in firsts if first != pieces[index]},
            ends_mask_W=_pack(ends_V),
        )


def _unpack(mask_W: Tensor) -> Tensor:
    """A bit for each id, 32 in a word, the lowest first, as booleans."""
    return (mask_W[:, None] >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten()


def _pack(allowed_V: Tensor) -> Tensor:
    bits = allowed_V.unflatten(0, (-1, 32)).long() << torch.arange(32)
    return bits.sum(dim=-1).to(torch.int32)  # the highest bit becomes the sign


def _alphabet(pieces: Iterable[bytes]) -> CharSet:
    """The characters of which every byte is a token by itself, and those that are a token as a whole."""
    pieces = set(pieces)
    singles = {piece[0] for piece in pieces if len(piece) == 1}
    tails = set(range(0x80, 0xC0)) <= singles
    ranges = [(byte, byte) for byte in singles if byte < 0x80]
    for lead in singles if tails else ():
        if 0xC2 <= lead < 0xE0:
            ranges.append(((lead & 0x1F) << 6, (lead & 0x1F) << 6 | 0x3F))
        elif 0xE0 <= lead < 0xF0:
            ranges.append((max((lead & 0x0F) << 12, 0x800), (lead & 0x0F) << 12 | 0xFFF))
        elif 0xF0 <= lead < 0xF5:
            ranges.append((max((lead & 0x07) << 18, 0x10000), min((lead & 0x07) << 18 | 0x3FFFF, 0x10FFFF)))
    for piece in pieces:
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            continue
        ranges += [(ord(text), ord(text))] if len(text) == 1 else []
    return ~~CharSet.of(ranges)  # without surrogates


def _schema_rules(source: str, alphabet: CharSet) -> str:
    return json_schema.to_ebnf(json.loads(source), alphabet=alphabet)


def _regex_rules(pattern: str, alphabet: CharSet) -> str:
    return "\n".join(regex.to_rules(pattern, "root", alphabet=alphabet))


def _choice_rules(source: str, alphabet: CharSet) -> str:
    texts = sorted(set(json.loads(source)))
    for character in sorted(set("".join(texts))):
        if character not in alphabet:
            raise ValueError(f"this model's vocabulary cannot write {character!r}")
    return f"root ::= {' | '.join(map(as_ebnf, texts))}"
