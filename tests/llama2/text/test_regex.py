"""A reply matches its regular expression as a whole, and what cannot be held to is refused by name."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama2.text.grammar import GrammarCompiler
from llama2.text.json_schema import MAX_PATTERN_LENGTH
from llama2.text.tokenizer import Tokenizer
from tests.support.replies import PADDING, accepts, random_reply


@pytest.fixture(scope="session")
def compiler(sp: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(sp, sp.vocab_size + PADDING)


def _patterns() -> st.SearchStrategy[str]:
    atoms = st.sampled_from(
        ["a", "b", "c", ".", r"\d", r"\w", r"\s", "[ab]", "[^a]", "[a-c]", r"\.", r"[^\w.]", "é", r"\D"]
    )

    def within(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        repeats = st.sampled_from(["*", "+", "?", "{2}", "{0,2}", "{1,}", "*?", "??"])
        return st.one_of(
            st.lists(inner, max_size=3).map("".join),
            st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
            st.builds(lambda part, repeat: f"(?:{part}){repeat}", inner, repeats),
        )

    return st.recursive(atoms, within, max_leaves=6)


TEXTS = st.text(st.sampled_from("abcé1. \n-_٣ü\u00a0"), max_size=5)


@settings(deadline=None, max_examples=200)
@given(pattern=_patterns(), texts=st.lists(TEXTS, max_size=8))
def test_what_is_written_is_what_python_matches(
    sp: Tokenizer, compiler: GrammarCompiler, pattern: str, texts: list[str]
) -> None:
    grammar = compiler.regex(pattern)
    for text in texts:
        assert accepts(sp, grammar, text) == (re.fullmatch(pattern, text, re.ASCII) is not None), text


@settings(deadline=None, max_examples=60)
@given(data=st.data(), pattern=_patterns())
def test_every_match_can_be_written(
    sp: Tokenizer, compiler: GrammarCompiler, data: st.DataObject, pattern: str
) -> None:
    text = data.draw(st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True))
    assume(len(text) < 50 and re.fullmatch(r"[\t\n\r\f\v\x20-\x7f]*", text))
    assert accepts(sp, compiler.regex(pattern), text)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("^ab$", "ab", "^ab$"),
        ("^a$|^b$", "b", "ab"),
        (r"\Aa\z", "a", "b"),
        (".", "\u00e9", "\n"),
        (r"\d", "7", "\u0663"),
        (r"[^\d]", "\u0663", "7"),
        (r"\S", "\u00e9", "\n"),
        (r"[\w-]", "-", "ü"),
        (r"[\s\S]", "\n", "ab"),
        ("[🙂-🙃]", "🙂", "🙁"),
        (r"[]\]\-\\^]+", "]-\\^", "["),
        (r"\x41\u0042\t/", "AB\t/", "AB"),
        ("a{0,2}b", "aab", "aaab"),
        ("(?P<name>a)+", "aa", ""),
        ("(?i)a(?-i)b", "Ab", "AB"),
        (r"\p{Greek}", "α", "a"),
        ("a\nb", "a\nb", "anb"),
    ],
)
def test_details_of_the_dialect(
    sp: Tokenizer, compiler: GrammarCompiler, pattern: str, inside: str, outside: str
) -> None:
    grammar = compiler.regex(pattern)
    assert accepts(sp, grammar, inside)
    assert not accepts(sp, grammar, outside)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("b", "abc", "ac"),
        ("^b", "bc", "ab"),
        (r'^[a"\\\n\x01é]{3}$', r"\"\\\n", r"\u0061aa"),
        ("^.$", "é", r"\n"),
    ],
)
def test_a_pattern_of_a_schema_is_found_anywhere_in_the_text_that_json_escapes(
    sp: Tokenizer, compiler: GrammarCompiler, pattern: str, inside: str, outside: str
) -> None:
    grammar = compiler.json_schema({"type": "string", "pattern": pattern})
    assert accepts(sp, grammar, f'"{inside}"')
    assert not accepts(sp, grammar, f'"{outside}"')


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "llguidance refuses it: '(': unclosed group"),
        ("[z-a]", "llguidance refuses it: '[z-a]': invalid character class range"),
        ("x{99999999999}", "llguidance refuses it: 'x{99999999999}': decimal literal invalid"),
        (r"(a)\1", r"llguidance refuses it: '(a)\\1': backreferences are not supported"),
        ("(?=a)a", "llguidance refuses it: '(?=a)a': look-around"),
        ("(?<!b)a", "llguidance refuses it: '(?<!b)a': look-around"),
        (r"\bfoo", "llguidance refuses it: lookarounds not supported yet; Word"),
        ("a^b", "llguidance refuses it: lookarounds not supported yet; Start in regex /a^b/"),
        ("(^a)+", "llguidance refuses it: lookarounds not supported yet; Start in regex /(^a)+/"),
        ("(" * 1500 + ")" * 1500, "llguidance refuses it: "),
        (r"[^\s\S]", "it allows no text"),
        ("a" * (MAX_PATTERN_LENGTH + 1), f"it must have at most {MAX_PATTERN_LENGTH} characters"),
    ],
)
def test_what_cannot_be_held_to_is_refused(compiler: GrammarCompiler, pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}[^\\n]*$"):
        compiler.regex(pattern)


HOSTILE = [
    "([a-z]{0,100}){0,100}",
    "(a|aa){0,1000}",
    "(a?){3000}",
    "(a|b)*a(a|b){20}",
    "(.?.?.?.?.?.?.?.?){400}",
    r"(\w+\s?){0,200}",
    "|".join(f"{letter}{{0,80}}" for letter in "abcdefgh"),
    "(a*)*",
    "([a-z]*){0,1000}",
]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_ambiguity_costs_little(bpe: Tokenizer, caplog: pytest.LogCaptureFixture, pattern: str) -> None:
    """Patterns that keep a backtracking matcher busy for ages are followed, even in a large vocabulary."""
    start = time.process_time()
    grammar = GrammarCompiler(bpe, bpe.vocab_size + PADDING).regex(pattern)
    assert time.process_time() - start < 2
    start = time.process_time()
    random_reply(bpe, grammar, 0, max_new_tokens=50, favoured=dict.fromkeys(bpe.eos_ids, -9.0))
    assert time.process_time() - start < 2
    assert not caplog.records, "it was given up"


def test_what_costs_too_much_after_all_ends_the_reply(bpe: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """And the log says so."""
    grammar = GrammarCompiler(bpe, bpe.vocab_size + PADDING).regex("((a{0,99}){0,99}){0,99}")
    start = time.process_time()
    random_reply(bpe, grammar, 0, max_new_tokens=50, favoured=dict.fromkeys(bpe.eos_ids, -9.0))
    assert time.process_time() - start < 2
    (record,) = caplog.records
    assert record.getMessage() == "a reply leaves its grammar: lexer error: too many expressions constructed"
