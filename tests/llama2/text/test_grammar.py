"""Whatever a model's logits are, the reply follows the grammar, for both kinds of vocabulary."""

from __future__ import annotations

import datetime
import json
import re
import time
import uuid
from typing import Annotated, Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from llama2.engine.token_masks import forbid
from llama2.text.grammar import GrammarCompiler
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.replies import PADDING, follows, random_reply, restrict
from tests.support.tokenizer_json import smollm2_tokenizer
from tests.support.tokenizers import tiny_sentencepiece

Both = tuple[Tokenizer, GrammarCompiler]


def both_of(tokenizer: Tokenizer) -> Both:
    return tokenizer, GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING)


@pytest.fixture(scope="module")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both_of(load_tokenizer(tiny_sentencepiece(tmp_path_factory.mktemp("sp"))))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return both_of(load_tokenizer(smollm2_tokenizer(tmp_path_factory.mktemp("bpe"))))


@pytest.fixture(params=["sp", "bpe"])
def model(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


# ---- JSON


def _schemas() -> st.SearchStrategy[dict[str, Any]]:
    numbers = st.integers(-1000, 1000) | st.decimals(-1000, 1000, places=3).map(float)
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}, {"type": "string"}]),
        st.lists(st.none() | st.text(max_size=5) | st.integers(), min_size=1, max_size=3).map(lambda v: {"enum": v}),
        st.tuples(st.integers(0, 3), st.integers(3, 9)).map(
            lambda n: {"type": "string", "minLength": n[0], "maxLength": n[1]}
        ),
        st.builds(
            lambda kind, low, size: {"type": kind, "minimum": low, "maximum": low + size},
            st.sampled_from(["integer", "number"]),
            numbers,
            st.integers(1, 5000),
        ),
        numbers.map(lambda n: {"type": "number", "exclusiveMinimum": n}),
        numbers.map(lambda n: {"type": "integer", "exclusiveMaximum": n}),
    )

    def within(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        names = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
        properties = st.dictionaries(names, inner, max_size=3)
        return st.one_of(
            properties.flatmap(
                lambda p: st.sets(st.sampled_from([*p]) if p else st.nothing()).map(
                    lambda r: {"type": "object", "properties": p, "required": sorted(r)}
                )
            ),
            st.tuples(inner, st.integers(0, 2), st.integers(2, 3)).map(
                lambda a: {"type": "array", "items": a[0], "minItems": a[1], "maxItems": a[2]}
            ),
            st.lists(inner, min_size=1, max_size=2).map(lambda p: {"type": "array", "prefixItems": p, "items": False}),
            inner.map(lambda i: {"type": "object", "additionalProperties": i, "maxProperties": 2}),
            st.lists(inner, min_size=1, max_size=3).map(lambda cases: {"anyOf": cases}),
        )

    return st.recursive(leaves, within, max_leaves=5)


@settings(deadline=None, max_examples=120)
@given(schema=_schemas(), seed=st.integers(0, 2**32))
def test_a_reply_follows_its_schema_whatever_the_logits(sp: Both, schema: dict[str, Any], seed: int) -> None:
    """A reply that ended parses and follows the schema; one that was cut is valid Unicode as far as it goes."""
    tokenizer, compiler = sp
    try:
        grammar = compiler.json_schema(schema)
    except ValueError as error:
        # The only faults that these schemas can have.
        assert "cannot write" in str(error) or "/enum must be within" in str(error)  # noqa: PT017
        return
    text, ended = random_reply(tokenizer, grammar, seed, max_new_tokens=150)
    if ended:
        assert follows(json.loads(text), schema), text


@settings(deadline=None, max_examples=15)
@given(schema=_schemas(), seed=st.integers(0, 2**32))
def test_it_does_so_with_a_byte_level_vocabulary(bpe: Both, schema: dict[str, Any], seed: int) -> None:
    test_a_reply_follows_its_schema_whatever_the_logits.hypothesis.inner_test(bpe, schema, seed)  # type: ignore[attr-defined]


class Circle(BaseModel):
    kind: Literal["circle"]
    radius: Annotated[float, Field(gt=0, le=10)]


class Square(BaseModel):
    kind: Literal["square"]
    side: Annotated[int, Field(ge=-3, lt=12)]


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")
    number: uuid.UUID
    day: datetime.date
    at: datetime.datetime
    until: datetime.time | None
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}-\d+$", max_length=None)]
    name: Annotated[str, Field(min_length=1, max_length=8)]
    shape: Annotated[Circle | Square, Field(discriminator="kind")]
    pair: tuple[int, bool]
    counts: dict[str, int] = {}
    children: Annotated[list[Order], Field(max_length=1)] = []


def test_pydantic_reads_what_its_own_schema_allows(model: Both) -> None:
    """A model with references to itself, a union told apart by a const, formats, and a pattern."""
    tokenizer, compiler = model
    grammar = compiler.json_schema(Order.model_json_schema())
    ends = {tokenizer.encode(text)[-1]: 3.0 for text in ('"', "}", "]")}
    replies = [random_reply(tokenizer, grammar, seed, favoured=ends) for seed in range(12)]
    assert sum(ended for _, ended in replies) >= 6
    for text, ended in replies:
        if ended:
            Order.model_validate_json(text)


def test_any_object_is_an_object(model: Both) -> None:
    tokenizer, compiler = model
    ends = {tokenizer.encode(text)[-1]: 2.0 for text in ('"', "}", "]")}
    replies = [
        random_reply(tokenizer, compiler.json_object(), seed, max_new_tokens=100, favoured=ends) for seed in range(20)
    ]
    assert sum(ended for _, ended in replies) >= 5
    for text, ended in replies:
        if ended:
            assert isinstance(json.loads(text), dict)
        else:
            with pytest.raises(json.JSONDecodeError):
                json.loads(text)


def test_white_space_comes_to_an_end(sp: Both) -> None:
    """A model that prefers spaces, and as many digits as are allowed, still ends."""
    tokenizer, compiler = sp
    wanted = {
        token_id: 100.0
        for token_id in range(tokenizer.vocab_size)
        if set(tokenizer.token_bytes(token_id)) <= set(b" \n\t0123456789")
    }
    number = {"type": "integer", "minimum": 0, "maximum": 10**15}
    grammar = compiler.json_schema({"type": "array", "items": number, "minItems": 3, "maxItems": 3})
    text, ended = random_reply(tokenizer, grammar, 0, favoured=wanted)
    assert ended
    assert len(json.loads(text)) == 3


def test_a_cut_reply_is_the_beginning_of_the_whole_one(model: Both) -> None:
    tokenizer, compiler = model
    grammar = compiler.json_schema(
        {"type": "array", "items": {"enum": ["année", "🙂", 17]}, "minItems": 9, "maxItems": 9}
    )
    whole, ended = random_reply(tokenizer, grammar, 3)
    assert ended
    for length in (1, 5, 20):
        cut, ended = random_reply(tokenizer, grammar, 3, max_new_tokens=length)
        assert not ended
        assert whole.startswith(cut)


# ---- Regular expressions and choices

PATTERNS = [
    r"[a-z]{3}\d+(\.\d{2})?",
    r"(yes|no|maybe( so)?)!*",
    r"\S+@\S+\.(com|org)",
    r"^[^\d\s]{1,5}$",
    r"(foo|foobar)(bar)?",
    r"\[INST\].\W",
    r"é+🙂{2}[α-ω]?",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_reply_matches_its_regex_as_a_whole(model: Both, pattern: str) -> None:
    tokenizer, compiler = model
    grammar = compiler.regex(pattern)
    for continues_prompt in (True, False):
        for seed in range(5):
            text, ended = random_reply(tokenizer, grammar, seed, continues_prompt=continues_prompt, max_new_tokens=60)
            if ended:
                assert re.fullmatch(pattern, text, re.ASCII), text


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=6)
)
def test_a_reply_is_one_of_its_choices(sp: Both, texts: list[str]) -> None:
    """Quotes, backslashes, brackets and line breaks are what they are; each choice can be made."""
    tokenizer, compiler = sp
    grammar = compiler.choice(texts)
    for continues_prompt in (True, False):
        for seed in range(3):
            text, ended = random_reply(tokenizer, grammar, seed, continues_prompt=continues_prompt)
            assert ended
            assert text in texts


def test_a_text_of_its_own_may_begin_as_the_model_writes_words(sp: Both) -> None:
    """With SentencePiece a first word has a space, which is not shown; a continuation shows all it has."""
    tokenizer, compiler = sp
    grammar = compiler.choice(["the dog"])
    word = tokenizer.encode("the")[0]
    assert tokenizer.token_bytes(word) == b" the"
    zeros_V = torch.zeros(tokenizer.vocab_size + PADDING)
    assert restrict(grammar.matcher(continues_prompt=True), zeros_V)[word] == -torch.inf
    assert restrict(grammar.matcher(continues_prompt=False), zeros_V)[word] == 0
    # The word cannot begin a text that itself begins with a space: its own is not shown.
    for seed in range(5):
        assert random_reply(tokenizer, compiler.choice([" the dog"]), seed) == (" the dog", True)
    assert restrict(compiler.choice([" the dog"]).matcher(continues_prompt=False), zeros_V)[word] == -torch.inf


# ---- Matchers


def test_a_mask_forbids_all_that_cannot_follow_and_nothing_else(model: Both) -> None:
    """For several masks at once, and many ways to write the same text."""
    tokenizer, compiler = model
    starts = (
        lambda piece: any(text.startswith(piece) for text in (b"ab c", b"cd")),
        lambda piece: not piece.strip(b"0123456789"),
        lambda piece: b'{"name": '.startswith(piece),
    )
    schema = {"type": "object", "properties": {"name": {"type": "null"}}, "required": ["name"]}
    grammars = compiler.choice(["ab c", "cd"]), compiler.regex(r"[0-9]+"), compiler.json_schema(schema)
    logits_NV = torch.randn(3, tokenizer.vocab_size + PADDING)
    allowed_NV = forbid(logits_NV, [one.matcher().mask_W() for one in grammars]) > -torch.inf
    for allowed_V, is_start in zip(allowed_NV, starts, strict=True):
        pieces = [tokenizer.token_bytes(index) for index in range(len(allowed_V))]
        expected = [bool(piece) and is_start(piece) for piece in pieces]
        assert [piece for piece, may in zip(pieces, allowed_V.tolist(), strict=True) if may] == [
            piece for piece, may in zip(pieces, expected, strict=True) if may
        ]


def test_replies_of_one_grammar_do_not_disturb_each_other(sp: Both) -> None:
    tokenizer, compiler = sp
    grammar = compiler.choice(["ab", "cd"])
    one, other = grammar.matcher(), grammar.matcher()
    one.accept(tokenizer.spell(b"a")[0])
    rows = [restrict(matcher, torch.zeros(tokenizer.vocab_size + PADDING)) for matcher in (one, other)]
    assert [tokenizer.token_bytes(int(index)) for index in (rows[0] == 0).nonzero()] == [b"b"] * int(
        (rows[0] == 0).sum()
    )
    assert rows[1][tokenizer.spell(b"c")[0]] == 0


def test_after_its_end_a_reply_can_only_end(sp: Both) -> None:
    """Even where the engine goes on for some reason, or a token came that was forbidden."""
    tokenizer, compiler = sp
    for tokens in ([], [2], [2, 2]):
        matcher = compiler.choice(["a"]).matcher()
        matcher.accept(tokenizer.spell(b"x" if not tokens else b"a")[0])
        for token_id in tokens:
            matcher.accept(token_id)
        logits_V = restrict(matcher, torch.zeros(tokenizer.vocab_size + PADDING))
        assert (logits_V == 0).nonzero().flatten().tolist() == [2]


def test_restricting_costs_little_beside_a_step(bpe: Both) -> None:
    tokenizer, compiler = bpe
    matcher = compiler.json_object().matcher()
    rows = torch.randn(50, tokenizer.vocab_size + PADDING)
    restrict(matcher, rows[0])
    start = time.process_time()
    for row in rows:
        restrict(matcher, row)
    assert (time.process_time() - start) / len(rows) < 0.005
