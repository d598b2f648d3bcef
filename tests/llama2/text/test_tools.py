"""A forced call follows its schema, and a call comes out of the reply, however it came in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.text.dialog import Tool
from llama2.text.grammar import GrammarCompiler
from llama2.text.tokenizer import Tokenizer
from llama2.text.tools import ToolStream, call_schema
from tests.support.replies import PADDING, follows, random_reply

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
WEATHER = Tool(name="get_weather", description="Tells the weather", parameters=PARAMETERS)
CLOCK = Tool(name="clock")

# ---- Forced calls


@pytest.mark.parametrize("tools", [[CLOCK, WEATHER], [WEATHER]])
def test_a_forced_call_follows_its_tools_schema_whatever_the_logits(
    bpe: Tokenizer, sp: Tokenizer, tools: list[Tool]
) -> None:
    """References resolve within the parameters; cut short, it is still a call with its arguments so far."""
    for tokenizer in (sp, bpe):
        grammar = GrammarCompiler(tokenizer, tokenizer.vocab_size + PADDING).json_schema(call_schema(tools))
        names = set()
        for seed in range(8):
            text, ended = random_reply(tokenizer, grammar, seed)
            assert ended
            content, [(name, written)] = read(text, [], forced=True)
            names.add(name)
            arguments = json.loads(written)
            assert content == ""
            if name == "clock":
                assert arguments == {}
            else:
                assert follows(arguments, {**PARAMETERS, "additionalProperties": False})
                assert arguments.get("days", 1) in range(1, 10)
            _, [(_, cut)] = read(text[:-3], [], forced=True)
            assert written.startswith(cut)
        assert "get_weather" in names
        assert names <= {tool.name for tool in tools}


# ---- Replies

CALL_TEXTS = [
    '{"name": "clock", "arguments": {}}',
    ' \n{"name":"clock","arguments":{"a": {"b": "}"}}}\n',
    '{"arguments": {"x": 1}, "name": "clock"}',
    '{"type": "function", "name": "clock", "parameters": {"x": "é"}}',
    '<tool_call>\n{"name": "clock", "arguments": {"x": 1}}\n</tool_call>',
    '<tool_call>{"name": "clock", "arguments": {}}</tool_call><tool_call>{"name": "clock_2", "arguments": {}}',
    '[{"name": "clock", "arguments": {}}, {"name": "clock_2", "arguments": {"y": []}}]',
]
CONTENT_TEXTS = [
    "Hello",
    "",
    " ",
    '{"name": "rm", "arguments": {}}',
    '{"name": "clock"}',
    '{"name": "clock", "arguments": "x"}',
    '{"name": "clock", "arguments": {}, "more": 1}',
    '{"name": ["clock"], "arguments": {}}',
    '{"name": "clock", "arguments": {}} and more',
    'I call {"name": "clock", "arguments": {}}',
    '{"name": "clock", "arguments": {"x": NaN}}',
    '{"name": "clock", "arguments": {"x": 1e999}}',
    '{"name": "clock", "arguments": {"x": "\\ud800"}}',
    '{"answer": 42}',
    "[1, 2, 3]",
    "<tool_call>",
    "<tool_call>\nsure!\n</tool_call>",
    "<tool_cake>",
    "[" * 2000,
    '{"name": "clock", "arguments": {"a": ' + "[" * 2000,
]
NAMES = frozenset({"clock", "clock_2"})


def read(text: str, pieces: list[int], *, forced: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls that a client puts together from the pieces of a stream."""
    stream = ToolStream(NAMES, forced=forced)
    deltas, start = [], 0
    for size in [*pieces, len(text)]:
        deltas.append(stream.push(text[start : start + size]))
        start += size
    deltas.append(stream.finish())
    calls: dict[int, list[str]] = {}
    ids = {}
    for delta in (one for both in deltas for one in both.calls):
        if delta.id is not None:
            assert delta.index not in calls
            assert delta.name is not None
            calls[delta.index], ids[delta.index] = [delta.name, ""], delta.id
        calls[delta.index][1] += delta.arguments
    content = "".join(delta.content for delta in deltas)
    found = [(name, arguments) for name, arguments in calls.values()]
    assert stream.calls == len(found) == len({*ids.values()})
    return content, found


@pytest.mark.parametrize("text", CALL_TEXTS)
def test_a_reply_that_is_a_call_is_no_content(text: str) -> None:
    content, calls = read(text, [])
    assert content == ""
    assert [name for name, _ in calls] in (["clock"], ["clock", "clock_2"])
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)


@pytest.mark.parametrize("text", CONTENT_TEXTS)
def test_any_other_reply_is_content_to_the_letter(text: str) -> None:
    assert read(text, []) == (text, [])


@settings(deadline=None, max_examples=200)
@given(text=st.sampled_from([*CALL_TEXTS, *CONTENT_TEXTS]), pieces=st.lists(st.integers(0, 9), max_size=30))
def test_how_a_reply_is_cut_into_pieces_changes_nothing(text: str, pieces: list[int]) -> None:
    assert read(text, pieces) == read(text, [])


@settings(deadline=None, max_examples=100)
@given(pieces=st.lists(st.integers(0, 9), max_size=30), cut=st.integers(0, 60))
def test_nor_does_it_where_a_call_is_forced(pieces: list[int], cut: int) -> None:
    arguments = '{"x": {"y": "} }"}}'
    text = f'{{\n "name": "clock", "arguments" : {arguments} \n}}'
    assert read(text, pieces, forced=True) == ("", [("clock", arguments)])
    content, calls = read(text[:cut], pieces, forced=True)
    assert (content, calls) == read(text[:cut], [], forced=True)
    assert (content == text[:cut]) if not calls else (content == "" and arguments.startswith(calls[0][1]))


@pytest.mark.parametrize(
    ("text", "certain"),
    [
        ("Hello", 1),
        (" <b>", 3),
        ('{"answer": 1}', 4),
        ('{"name": "Paul", "age": 3}', 11),
        ("[1, 2]", 2),
        ('{"name": 3}', 10),
    ],
)
def test_content_flows_as_soon_as_it_cannot_be_a_call(text: str, certain: int) -> None:
    stream = ToolStream(NAMES)
    shown = ""
    for index, character in enumerate(text, start=1):
        shown += stream.push(character).content
        assert shown == (text[:index] if index >= certain else ""), index


def test_the_arguments_of_a_forced_call_flow_as_they_come() -> None:
    stream = ToolStream(NAMES, forced=True)
    assert stream.push('{"name": "clock", "argum').calls == ()
    first = stream.push('ents": {"a"').calls
    assert (first[0].name, first[0].arguments) == ("clock", "")
    assert "".join(call.arguments for call in first) == '{"a"'
    assert [call.arguments for call in stream.push(": 1").calls] == [": 1"]


def test_without_tools_all_is_content() -> None:
    stream = ToolStream(frozenset())
    assert stream.push(CALL_TEXTS[0]).content == CALL_TEXTS[0]
    assert stream.finish().content == ""
    assert stream.calls == 0
