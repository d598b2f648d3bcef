"""Owns the mask of tokens that keeps a reply inside a grammar: a JSON schema, a regex, a choice of texts, or calls of
tools.

The work is llguidance's, which is imported when the first grammar is asked for; what it is to make of a schema says
`json_schema`. Knows no sampler: `engine.sequence` says what a grammar and a matcher are to it.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.text.call_grammar import call_grammar
from llama2.text.json_schema import MAX_PATTERN_LENGTH, prepare
from llama2.text.tokenizer import Tokenizer

MAX_CHOICES = 1000
MAX_CHOICE_CHARACTERS = 20_000
_CACHED = 32
# Otherwise a text that is settled could be written in one way alone, as a tokenizer of llguidance's own would.
_OPTIONS = '%llguidance {"no_forcing": true}'
# As people write JSON, and no more of it than that: a model may want nothing but spaces.
_WHITE_SPACE = r"( |\n {0,24})"
# What a step may cost: with SmolLM2's vocabulary and the worst patterns that were tried, 0.1 s. llguidance's own limit
# is too low for (\w+\s?){0,200}.
_STEP_FUEL = 1_000_000

logger = logging.getLogger(__name__)


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
            return self._compiled(_of_schema, json.dumps(schema))
        except (TypeError, RecursionError):
            raise ValueError("the schema is no JSON, or is nested too deep") from None

    def json_object(self) -> CompiledGrammar:
        """Any JSON object."""
        return self._compiled(_of_schema, '{"type": "object"}')

    def regex(self, pattern: str) -> CompiledGrammar:
        r"""A text that the regular expression matches as a whole. The syntax is Rust's; \d, \w and \s are of ASCII."""
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise ValueError(f"it must have at most {MAX_PATTERN_LENGTH} characters, got {len(pattern)}")
        return self._compiled(_of_regex, pattern)

    def lark(self, source: str) -> CompiledGrammar:
        """What a grammar in llguidance's variant of Lark's syntax describes; its rule `start` is the whole text."""
        return self._compiled(_of_lark, source)

    def choice(self, texts: list[str]) -> CompiledGrammar:
        """One of the texts."""
        if not texts or len(texts) > MAX_CHOICES or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"it must be a list of 1 to {MAX_CHOICES} texts")
        if sum(map(len, texts)) > MAX_CHOICE_CHARACTERS:
            raise ValueError(f"its texts must have at most {MAX_CHOICE_CHARACTERS} characters together")
        return self._compiled(_of_choices, json.dumps(texts))

    def calls(self, schemas: Mapping[str, Mapping[str, Any]], *, several: bool) -> CompiledGrammar:
        """Any text, or calls of tools whose arguments follow the schemas: `call_grammar`."""
        return self._compiled(_of_calls, json.dumps([schemas, several]))

    def source(self, source: str) -> CompiledGrammar:
        """A grammar in llguidance's own words, such as a `CompiledGrammar`'s."""
        return self._compiled(_as_it_is, source)

    def _compile(self, write: Callable[[str, _Vocabulary], str], source: str) -> CompiledGrammar:
        return CompiledGrammar(write(source, self._vocabulary), self._vocabulary)

    @functools.cached_property
    def _vocabulary(self) -> _Vocabulary:
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise ValueError(f"constrained output needs llguidance, which is not installed ({error})") from None
        return _Vocabulary.of(self._tokenizer, self._vocab_size)


class CompiledGrammar:
    """What a reply must look like: `Grammar` of `engine.sequence`."""

    def __init__(self, source: str, vocabulary: _Vocabulary) -> None:
        """`source` is a grammar as llguidance reads it.

        Raises:
            ValueError: llguidance refuses it, or it allows nothing.
        """
        self.source = source
        self._vocabulary = vocabulary
        self._beginning = vocabulary.follow(source, vocabulary.tokens)
        _fill(vocabulary.empty_mask(), self._beginning)
        if self._beginning.is_error():
            reason = _reason(self._beginning.get_error())
            allows_nothing = reason == "NoExtensionBias"
            raise ValueError(
                "it allows no text that this model can write" if allows_nothing else f"llguidance refuses it: {reason}"
            )

    def matcher(self, *, continues_prompt: bool = True) -> GrammarMatcher:
        """For one reply. `continues_prompt` as in `Request`: False for a text of its own, which drops the space that
        SentencePiece puts before a first word."""
        begins_anew = not continues_prompt and self._vocabulary.first_tokens is not None
        return GrammarMatcher(
            self._beginning.deep_copy(), self._vocabulary, self._first_mask_W if begins_anew else None
        )

    @functools.cached_property
    def _first_mask_W(self) -> Tensor:
        """The mask of the first token of a text of its own: where its space is dropped, the rest of it decides."""
        mask_W = self._vocabulary.empty_mask()
        _fill(mask_W, self._vocabulary.follow(self.source, self._vocabulary.first_tokens))
        return mask_W


class GrammarMatcher:
    """One reply's way through a grammar: `Matcher` of `engine.sequence`.

    Where nothing can follow, the reply ends. Where a step would cost more than it may, the matcher has `failed`, and
    the reply can only end.
    """

    def __init__(self, matcher: Any, vocabulary: _Vocabulary, first_mask_W: Tensor | None) -> None:
        """`first_mask_W`: what the first token may be, if that is not what the grammar says of its bytes."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._mask_W = vocabulary.empty_mask()
        self._first_mask_W = first_mask_W
        self.failed = False

    def mask_W(self) -> Tensor:
        if self._first_mask_W is not None:
            return self._first_mask_W
        _fill(self._mask_W, self._matcher)
        if not self.failed and self._matcher.is_error():
            self.failed = True
            logger.warning("a reply leaves its grammar: %s", _reason(self._matcher.get_error()))
        return self._mask_W

    def accept(self, token_id: int) -> None:
        is_first, self._first_mask_W = self._first_mask_W is not None, None
        spelling = self._vocabulary.first_spellings.get(token_id) if is_first else None
        self._matcher.consume_tokens([token_id] if spelling is None else spelling)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Vocabulary:
    """What each id writes, as llguidance's `tokens`.

    Where the space of a first word is dropped, `first_tokens` are the same for a first token, and `first_spellings`
    other ids that write what is left of one whose space is dropped.
    """

    size: int
    tokenizer: Tokenizer
    tokens: Any
    first_tokens: Any
    first_spellings: dict[int, list[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int) -> _Vocabulary:
        end_ids = sorted(token_id for token_id in tokenizer.eos_ids if token_id < size)
        if not end_ids:
            raise ValueError("this model has no end-of-text token, so its replies cannot be held to a grammar")
        pieces = [b"" if index in end_ids else tokenizer.token_bytes(index) for index in range(size)]
        first_pieces = list(pieces)
        spellings = {}
        for index, piece in enumerate(pieces):
            first = tokenizer.token_bytes(index, first=True)
            if piece not in (b"", first):
                spelling = _spell(tokenizer, first)
                first_pieces[index], spellings[index] = first if spelling else b"", spelling
        return cls(
            size=size,
            tokenizer=tokenizer,
            tokens=_as_tokens(tokenizer, pieces, end_ids),
            first_tokens=_as_tokens(tokenizer, first_pieces, end_ids) if spellings else None,
            first_spellings=spellings,
        )

    def empty_mask(self) -> Tensor:
        return torch.zeros(-(-self.size // 32), dtype=torch.int32)

    def follow(self, source: str, tokens: Any) -> Any:
        """llguidance's matcher at the beginning of a text."""
        import llguidance

        limits = llguidance.LLParserLimits(step_lexer_fuel=_STEP_FUEL, verbose_errors=False)
        return llguidance.LLMatcher(tokens, source, log_level=0, limits=limits)

    def check_text(self, text: str, place: str = "") -> None:
        """Raise ValueError, which begins with `place`, unless every character can be written."""
        for character in sorted(set(text)):
            if not _spell(self.tokenizer, character):
                raise ValueError(f"{place}: this model's vocabulary cannot write {character!r}".removeprefix(": "))


def _as_tokens(tokenizer: Tokenizer, pieces: list[bytes], end_ids: list[int]) -> Any:
    import llguidance

    class Wrapped:
        """The fields that llguidance asks for, and how it would write a text in tokens, which masks do not need."""

        tokens = pieces
        eos_token_id = end_ids[0]
        bos_token_id = None
        special_token_ids = ()

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapped()), n_vocab=len(pieces), eos_token=end_ids)


def _spell(tokenizer: Tokenizer, text: str | bytes) -> list[int]:
    """Single characters and bytes that write it; none where there are no such tokens."""
    try:
        return tokenizer.spell(text if isinstance(text, bytes) else text.encode())
    except (KeyError, UnicodeEncodeError):
        return []


def _fill(mask_W: Tensor, matcher: Any) -> None:
    matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), mask_W.nbytes)


def _reason(message: str) -> str:
    """llguidance's own message in one line, without its state and its place in a grammar that nobody has written."""
    fault = re.search(r"^error: (.*)", message, re.MULTILINE)
    pattern = re.search(r"regex parse error:\n +(.*)\n", message)
    if fault:
        return f"{pattern[1]!r}: {fault[1]}" if pattern else fault[1]
    header = r'^(at \d+\(\d+\): )?(invalid regex ".*" \(in regex\): |failed to compile JSON schema: )?'
    return re.sub(header, "", message.split("\n")[0])


def _as_it_is(source: str, vocabulary: _Vocabulary) -> str:
    return source


def _of_schema(source: str, vocabulary: _Vocabulary) -> str:
    return f"{_OPTIONS}\nstart: %json {json.dumps(_prepared(source, vocabulary))}"


def _prepared(source: str, vocabulary: _Vocabulary) -> dict[str, Any]:
    schema = prepare(source, vocabulary.check_text)
    schema["x-guidance"] = {"whitespace_pattern": _WHITE_SPACE}  # instead of the user's, which could say "lenient"
    return schema


def _of_calls(source: str, vocabulary: _Vocabulary) -> str:
    schemas, several = json.loads(source)
    prepared = {}
    for name, schema in schemas.items():
        try:
            prepared[name] = _prepared(json.dumps(schema), vocabulary)
        except ValueError as error:
            raise ValueError(f"the parameters of {name}: {error}") from None
    return f"{_OPTIONS}\n{call_grammar(prepared, several=several)}"


def _of_regex(pattern: str, vocabulary: _Vocabulary) -> str:
    import llguidance

    vocabulary.check_text(pattern)
    ascii_alone = llguidance.regex_to_lark(pattern, "dws")
    (grammar,) = json.loads(llguidance.LLMatcher.grammar_from_regex(ascii_alone))["grammars"]
    return f"{_OPTIONS}\n{grammar['lark_grammar']}"


def _of_lark(source: str, vocabulary: _Vocabulary) -> str:
    return f"{_OPTIONS}\n{source}"


def _of_choices(source: str, vocabulary: _Vocabulary) -> str:
    texts = json.loads(source)
    vocabulary.check_text("".join(texts))
    literals = ("".join(f"\\x{{{ord(character):x}}}" for character in text) for text in texts)
    return _of_regex("|".join(literals), vocabulary)
