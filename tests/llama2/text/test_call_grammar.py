"""A reply with strict tools is any text, or calls whose arguments follow their schemas from the first token on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llama2.text.dialog import Tool
from llama2.text.grammar import CompiledGrammar, GrammarCompiler
from llama2.text.json_schema import MAX_OPTIONAL
from llama2.text.tokenizer import Tokenizer
from llama2.text.tools import ToolStream, call_schema
from tests.support.replies import PADDING, accepts, follows, random_reply

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
PLAIN = WEATHER | {"properties": {"city": WEATHER["properties"]["city"], "days": WEATHER["$defs"]["days"]}}
SCHEMAS = {"weather": WEATHER, "a-b_2": {"type": "object", "properties": {}, "additionalProperties": False}}
CALL = '{"name": "weather", "arguments": {"city": "Rome", "days": 3}}'
OTHER = '{"name":"a-b_2","arguments":{}}'


def compiled(tokenizer: Tokenizer, *, several: bool = True) -> CompiledGrammar:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING).calls(SCHEMAS, several=several)


def calls_in(text: str) -> list[tuple[str, Any]]:
    """What a client is told of a whole reply."""
    stream = ToolStream(SCHEMAS, strict=True)
    deltas = [*stream.push(text).calls, *stream.finish().calls]
    return [(str(delta.name), json.loads(delta.arguments)) for delta in deltas]


TEXTS = [
    "",
    "Hello. { is a brace",
    "[1] says so",
    "[1, 2]",
    '{"answer": 42}',
    '{"name": "Bob", "arguments": {}}',
    '{"name": "weather2"}',
    '{"type": "circle"}',
    "It is <tool_call> that begins a call",
    f"I call {CALL}",
]
CALLS = [
    (CALL, 1),
    (f"\n {CALL} \n", 1),
    (CALL.replace('"name": ', '\t"name"\t:\n\t').replace('"city": ', '"city":\n  '), 1),
    (CALL.replace("arguments", "parameters"), 1),
    (CALL.replace("{", '{"type": "function", ', 1), 1),
    (OTHER, 1),
    (f"<tool_call>\n{CALL}\n</tool_call>\n", 1),
    (f"<tool_call>{CALL}", 1),
    (f"<tool_call>{CALL}</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>", 2),
    (f"[{CALL}]", 1),
    (f"[{CALL}, {OTHER}]", 2),
]
NEITHER = [
    CALL.replace("Rome", "Oslo"),
    CALL.replace("3", "10"),
    CALL.replace("days", "weeks"),
    '{"name": "weather"}',
    '{"name": "weather", "arguments": "Rome"}',
    f"{CALL} and more",
    '{"arguments": {"city": "Oslo"}, "name": "weather"}',
    "<tool_call> sure",
    f"[{CALL}",
    f"[{CALL}, 1]",
]


def test_any_text_is_a_reply_and_no_call(sp: Tokenizer, bpe: Tokenizer) -> None:
    for tokenizer in (sp, bpe):
        grammar = compiled(tokenizer)
        for text in TEXTS:
            assert accepts(tokenizer, grammar, text), text
            assert calls_in(text) == []


def test_a_call_that_follows_its_schema_is_a_reply_however_it_is_written(sp: Tokenizer, bpe: Tokenizer) -> None:
    for tokenizer in (sp, bpe):
        several, one = compiled(tokenizer), compiled(tokenizer, several=False)
        for text, number in CALLS:
            assert accepts(tokenizer, several, text), text
            assert accepts(tokenizer, one, text) == (number == 1), text
            assert len(calls_in(text)) == number


def test_what_begins_as_a_call_is_one(sp: Tokenizer, bpe: Tokenizer) -> None:
    for tokenizer in (sp, bpe):
        grammar = compiled(tokenizer)
        assert not [text for text in NEITHER if accepts(tokenizer, grammar, text)]


@pytest.mark.parametrize("begins", ['{"name": "weather"', '<tool_call>\n{"name":"weather",', '[ {"name" : "weather"'])
def test_a_begun_call_follows_its_schema_whatever_the_logits(sp: Tokenizer, bpe: Tokenizer, begins: str) -> None:
    for tokenizer in (sp, bpe):
        grammar = compiled(tokenizer, several=False)
        for seed in range(6):
            text, ended = random_reply(
                tokenizer, grammar, seed, begins=begins, favoured=dict.fromkeys(tokenizer.eos_ids, 3.0)
            )
            assert ended
            ((name, arguments),) = calls_in(text)
            assert name == "weather"
            assert follows(arguments, PLAIN)
            assert arguments.keys() <= {"city", "days"}


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "weath\\u0065r", "arguments": {"city": "Oslo"}}',
        '{"n\\u0061me": "weather", "arguments": {"city": "Oslo"}}',
        '{"name": "Bob", "name": "weather", "arguments": {"city": "Oslo"}}',
        " " * 33 + '{"name": "weather", "arguments": {"city": "Oslo"}}',
    ],
)
def test_a_call_in_disguise_is_content(bpe: Tokenizer, text: str) -> None:
    """The grammar lets it through as a text, and so that is what it is."""
    assert accepts(bpe, compiled(bpe), text)
    assert calls_in(text) == []


def test_a_reply_with_a_format_of_its_own_may_be_a_call_instead(bpe: Tokenizer) -> None:
    """References of each schema stay within it."""
    answer: dict[str, Any] = {"type": "object", "properties": {"days": {"$ref": "#/$defs/days"}}, "required": ["days"]}
    answer |= {"additionalProperties": False, "$defs": {"days": {"enum": [1, 2]}}}
    tools = [Tool(name=name, parameters=schema) for name, schema in SCHEMAS.items()]
    schema = call_schema(tools, instead=answer)
    grammar = GrammarCompiler(bpe, bpe.vocab_size + PADDING).json_schema(schema)
    assert all(accepts(bpe, grammar, text) for text in ('{"days": 2}', CALL, OTHER))
    assert not any(accepts(bpe, grammar, text) for text in ('{"days": 3}', CALL.replace("3", "10"), "Hello"))


def test_a_schema_that_cannot_be_followed_is_refused_with_the_name_of_its_tool(bpe: Tokenizer) -> None:
    """By our own check; what llguidance refuses it does not say where."""
    compiler = GrammarCompiler(bpe, bpe.vocab_size)
    wide = {"type": "object", "properties": {f"p{index}": {} for index in range(MAX_OPTIONAL + 1)}}
    with pytest.raises(ValueError, match=r"^the parameters of weather: #/properties"):
        compiler.calls({"weather": wide}, several=True)
    with pytest.raises(ValueError, match=r'^llguidance refuses it: .*"not"'):
        compiler.calls({"weather": {"type": "object", "not": {}}}, several=True)
