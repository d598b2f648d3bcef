"""What no user's schema can do to a server: crash it, or hold it up."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llama2.text.grammar import GrammarCompiler
from llama2.text.json_schema import MAX_CASES, MAX_COMBINED_PATTERNS, MAX_LENGTH, MAX_OPTIONAL
from llama2.text.schema_parts import MAX_DEPTH, MAX_LEVELS
from llama2.text.tokenizer import Tokenizer
from tests.support.replies import PADDING, random_reply


@pytest.fixture(scope="session")
def compiler(sp: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(sp, sp.vocab_size)


def test_nesting_has_a_limit(compiler: GrammarCompiler) -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(MAX_DEPTH + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}"):
        compiler.json_schema(schema)
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested"):
        compiler.json_schema(schema)
    constant: Any = 1
    for _ in range(900):
        constant = [constant]
    with pytest.raises(ValueError, match=r"nested|recursion"):
        compiler.json_schema({"const": constant})


def _chain(length: int, link: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    defs = {f"d{index}": link({"$ref": f"#/$defs/d{index + 1}"}) for index in range(length)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema",
    [
        _chain(5000, lambda link: link),
        _chain(900, lambda link: {"type": "object", "properties": {"a": link}}),
        _chain(90, lambda link: json.loads('{"items": ' * 60 + json.dumps(link) + "}" * 60)),
        {"properties": {f"p{index}": {} for index in range(MAX_OPTIONAL + 1)}},
        {"anyOf": [{"type": "string", "maxLength": index} for index in range(300)]},
        {"items": {"anyOf": [{"type": "array", "maxItems": index} for index in range(500)]}},
        {"allOf": [{"pattern": f"a.*{index}"} for index in range(MAX_COMBINED_PATTERNS + 1)]},
        {"allOf": [{"anyOf": [{"required": [f"{c}{i}"]} for c in "pq"]} for i in range(1000)]},
        {"enum": ["x" * MAX_LENGTH]},
        {"enum": [{"a": index} for index in range(300)]},
        {"anyOf": [{"const": [index]} for index in range(300)]},
        {"pattern": "(a|b)?" * 1000},
        {"patternProperties": {"(a|b)?" * 1000: {}}},
    ],
    ids=lambda schema: json.dumps(schema)[:50],
)
def test_what_would_cost_too_much_is_refused_in_a_moment(compiler: GrammarCompiler, schema: Any) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"large|at most"):
        compiler.json_schema(schema)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "link",
    [
        lambda link: link,
        lambda link: {"type": "object", "properties": {"a": link}},
        lambda link: {"anyOf": [{"type": "array", "items": link}, {"type": "null"}]},
        lambda link: {**link, "type": ["null", "array"]},
    ],
)
def test_the_deepest_allowed_nesting_does_not_overflow_a_stack(compiler: GrammarCompiler, link: Any) -> None:
    """Nor a thread's. An overflow would end this process."""
    length = MAX_LEVELS // len(re.findall("{", json.dumps(link({})))) - 10
    thread = threading.Thread(target=lambda: done.append(compiler.json_schema(_chain(length, link))))
    done: list[Any] = []
    thread.start()
    thread.join()
    assert done


HOSTILE_SCHEMAS: list[Any] = [
    {"type": "string", "minLength": 100_000},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer"}, "maxItems": 10**9}, "maxItems": 10**9},
    {"anyOf": [{"type": "string", "maxLength": n} for n in range(1, MAX_CASES)]},
    {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(MAX_OPTIONAL)}},
    {"type": "object", "properties": {f"p{n}": {} for n in range(3000)}, "required": [f"p{n}" for n in range(3000)]},
    {"enum": ["x" * 90_000]},
    {"enum": [f"v{n}" for n in range(10_000)]},
    {"type": "array", "items": {"anyOf": [{"type": "array", "maxItems": n} for n in range(MAX_CASES)]}},
    {"type": "string", "pattern": "((a{0,99}){0,99}){0,99}"},
    {"allOf": [{"type": "string", "pattern": f"{n}.*b"} for n in range(MAX_COMBINED_PATTERNS)]},
]


@pytest.mark.parametrize("index", range(len(HOSTILE_SCHEMAS)))
def test_a_hostile_schema_costs_little(bpe: Tokenizer, index: int) -> None:
    """It is refused in a moment, or compiled in one and followed in short steps."""
    compiler = GrammarCompiler(bpe, bpe.vocab_size + PADDING)
    compiler.json_object()
    start = time.process_time()
    try:
        grammar = compiler.json_schema(HOSTILE_SCHEMAS[index])
    except ValueError as error:
        assert "llguidance refuses it" in str(error)  # noqa: PT017
        return
    finally:
        assert time.process_time() - start < 2
    start = time.process_time()
    random_reply(bpe, grammar, 0, max_new_tokens=50)
    assert time.process_time() - start < 2


def test_a_reply_that_would_cost_too_much_ends_and_the_log_says_so(
    bpe: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    matcher = GrammarCompiler(bpe, bpe.vocab_size).json_schema(HOSTILE_SCHEMAS[7]).matcher()
    for token_id in bpe.spell(b"[" * 9):
        matcher.accept(token_id)
        last_W = matcher.mask_W()
    ends = [index for index in range(bpe.vocab_size) if int(last_W[index // 32]) >> index % 32 & 1]
    assert ends == sorted(bpe.eos_ids)
    assert matcher.failed
    (record,) = caplog.records
    assert record.getMessage().startswith("a reply leaves its grammar: Parser Error: Current row has")
