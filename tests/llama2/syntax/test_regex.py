"""The rules of a regular expression write exactly what it matches."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import xgrammar
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama2.syntax.charset import ALL, CharSet
from llama2.syntax.regex import MAX_LENGTH, to_rules

# Each byte a token, and an end.
BYTES = xgrammar.TokenizerInfo([bytes([index]) for index in range(256)] + [b""], vocab_size=257, stop_token_ids=[256])
COMPILER = xgrammar.GrammarCompiler(BYTES, max_threads=1, cache_enabled=False)


def accepts(rules: str) -> Callable[[str], bool]:
    compiled = COMPILER.compile_grammar(rules)

    def whole(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return (not text or matcher.accept_string(text.encode())) and matcher.accept_token(256)

    return whole


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
def test_what_is_written_is_matched_and_of_ascii_all_that_is_matched(pattern: str, texts: list[str]) -> None:
    accept = accepts("\n".join(to_rules(pattern, "root")))
    for text in texts:
        matches = re.fullmatch(pattern, text) is not None
        if accept(text):
            assert matches, text
        elif matches:
            assert not text.isascii() or "\n" in text, text


@settings(deadline=None, max_examples=60)
@given(data=st.data(), pattern=_patterns())
def test_every_ascii_match_can_be_written(data: st.DataObject, pattern: str) -> None:
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    assume(text.isascii() and len(text) < 50 and re.fullmatch(r"[\t\n\r\f\v\x20-\x7f]*", text))
    assert accepts("\n".join(to_rules(pattern, "root")))(text)


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("^ab$", "ab", "^ab$"),
        ("^a$|^b$", "b", "ab"),
        (r"\Aa\Z", "a", "b"),
        (".", "\u00e9", "\n"),
        (r"\d", "7", "\u0663"),
        (r"\S", "\u00e9", "\u00a0"),
        (r"[^\s]", "\u00e9", "\u2003"),
        (r"[\s\S]", "\n", "ab"),
        ("[🙂-🙃]", "🙂", "🙁"),
        (r"[]\]\-\\^]+", "]-\\^", "["),
        (r"\x41\u0042\t", "AB\t", "AB"),
        ("a{,2}b", "aab", "aaab"),
        ("(?P<name>a)+", "aa", ""),
    ],
)
def test_details_of_the_dialect(pattern: str, inside: str, outside: str) -> None:
    accept = accepts("\n".join(to_rules(pattern, "root")))
    assert accept(inside)
    assert not accept(outside)


def test_inside_a_json_string_the_same_text_is_escaped() -> None:
    accept = accepts("\n".join(to_rules(r'[a"\\\n\x01é]{3}', "root", in_json=True)))
    assert accept(r"\"\\\n")
    assert accept("aéa")
    for text in ('"aa', "\naa", "\x01aa", r"\u0061aa", "aa"):
        assert not accept(text)


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("(", "it is not valid: missing )"),
        ("a**", "it is not valid: multiple repeat"),
        ("[z-a]", "it is not valid: bad character range"),
        (r"\p{L}", "it is not valid: bad escape"),
        ("x{99999999999}", "it is not valid"),
        (r"(a)\1", "a back reference is not supported"),
        ("(?=a)a", "look-around is not supported"),
        ("(?<!b)a", "look-around is not supported"),
        (r"\bfoo", "a border of words, or ^ or $ inside of it is not supported"),
        ("a^b", "a border of words, or ^ or $ inside of it is not supported"),
        ("(^a)+", "a border of words, or ^ or $ inside of it is not supported"),
        ("(?i)a", "flags are not supported"),
        ("(?s:.)", "flags are not supported"),
        (r"[^\s\S]", "it matches no text"),
        ("a[^\\x00-\\U0010ffff]", "it matches no text"),
        ("a" * (MAX_LENGTH + 1), f"it must have at most {MAX_LENGTH} characters"),
    ],
)
def test_what_a_grammar_cannot_know_is_refused(pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        to_rules(pattern, "root")


HOSTILE = [
    "((a{0,99}){0,99}){0,99}",
    "([a-z]{0,100}){0,100}",
    "(a|aa){0,1000}",
    "(a?){3000}",
    "(a|b)*a(a|b){20}",
    "(.?.?.?.?.?.?.?.?){400}",
    "(" * 1500 + ")" * 1500,
    "|".join(f"{letter}{{0,80}}" for letter in "abcdefgh"),
]


@pytest.mark.parametrize("index", range(len(HOSTILE)))
def test_a_hostile_pattern_is_refused_in_a_moment(index: int) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^it is (too large|nested too deep)"):
        to_rules(HOSTILE[index], "root")
    assert time.process_time() - start < 2


def test_ambiguity_costs_nothing() -> None:
    """Patterns that keep a backtracking matcher busy for ages are a state or two."""
    assert len(to_rules("(a*)*", "root")) == 1
    assert len(to_rules("(a|a|aa)+", "root")) <= 3
    assert len(to_rules("([a-z]*){0,1000}", "root")) == 1


# ---- Sets of characters

SETS = st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF)), max_size=4).map(
    lambda pairs: CharSet.of((min(pair), max(pair)) for pair in pairs) & ALL
)


@settings(deadline=None)
@given(one=SETS, other=SETS, character=st.characters(exclude_categories=["Cs"]))
def test_sets_are_sets(one: CharSet, other: CharSet, character: str) -> None:
    inside = character in one, character in other
    assert (character in (one | other)) == any(inside)
    assert (character in (one & other)) == all(inside)
    assert (character in (one - other)) == (inside == (True, False))
    assert (character in ~one) != inside[0]
    assert ~~one == one


@settings(deadline=None, max_examples=50)
@given(one=SETS, character=st.characters(exclude_categories=["Cs"]))
def test_a_class_of_a_grammar_is_its_set(one: CharSet, character: str) -> None:
    chars = one | CharSet.chars("x")
    assert accepts(f"root ::= {chars.as_ebnf()}")(character) == (character in chars)
