"""A schema is followed to the letter, or refused by the keyword that cannot be. What random replies show of this is in
test_grammar."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.syntax.charset import CharSet
from llama2.syntax.json_schema import MAX_DEPTH, to_ebnf
from tests.llama2.syntax.test_regex import accepts
from tests.support.replies import follows


def allows(schema: Any, value: Any) -> bool:
    return accepts(to_ebnf(schema))(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a":1}', '{\n  "a": 1\n}', '{ "a" : 1 }'])
def test_white_space_is_as_people_write_json(text: str) -> None:
    assert allows({"type": "object", "properties": {"a": {"type": "integer"}}}, text)


@pytest.mark.parametrize("text", ['{  "a":1}', '{\n\n"a":1}', '{"a":\t1}', ' {"a":1}', '{"a":1} '])
def test_and_bounded(text: str) -> None:
    assert not allows({"type": "object", "properties": {"a": {"type": "integer"}}}, text)


def test_optional_properties_may_be_left_out_and_others_not_added() -> None:
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "abcd"}, "required": ["b"]}
    accept = accepts(to_ebnf(schema))
    for names in ("b", "ab", "bc", "bd", "abcd", "abd"):
        assert accept(json.dumps(dict.fromkeys(names))), names
    for names in ("", "a", "acd", "ba", "be"):
        assert not accept(json.dumps(dict.fromkeys(names))), names


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "object"}, {"any": [1, {"x": None}]}),
        ({"type": "object", "properties": {}}, {}),
        ({"type": "object", "required": ["a"]}, {"a": "anything"}),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a": 1, "b": 2}),
        ({"properties": {"a": {"type": "null"}}}, {"a": None}),
        ({"items": {"type": "null"}}, [None]),
        ({}, [1.5e3, "x", {}]),
        (True, {"a": []}),
        ({"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}]}, [None, 4]),
        ({"type": ["string", "null"], "title": "t", "description": "d", "default": 1}, None),
        ({"type": "string", "enum": ["a", 1]}, "a"),
        ({"const": {"a": [1, "é"]}}, '{"a": [1, "é"]}'),
        ({"oneOf": [{"type": "integer"}, {"type": "string"}]}, 1),
        ({"allOf": [{"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"type": "null"}}}, None),
        ({"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}, None),
        (
            {
                "type": "object",
                "properties": {"a": {"$id": "a", "$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}},
            },
            {"a": None},
        ),
    ],
)
def test_schemas_that_allow(schema: Any, value: Any) -> None:
    assert allows(schema, json.dumps(value) if isinstance(value, str) and not value.startswith("{") else value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, '"\\ud800"'),
        ({"type": "string"}, '"\n"'),
        ({"type": "string", "enum": ["a", 1]}, 1),
        ({"type": "integer"}, "1.5"),
        ({"type": "integer"}, "01"),
        ({"type": "integer"}, "1" * 5000),
        ({"type": "number"}, "1e999"),
        ({"type": "number"}, "NaN"),
        ({"type": "number", "minimum": 0.1}, "0.099999"),
        ({"type": "object", "additionalProperties": False}, {"a": 1}),
        ({"type": "object", "required": ["a"]}, {}),
        ({"type": "string", "format": "date"}, "2023-02-30"),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [None, None]),
    ],
)
def test_schemas_that_forbid(schema: Any, value: Any) -> None:
    assert not allows(schema, value)


NUMBERS = st.integers(-(10**6), 10**6) | st.decimals(-2000, 2000, places=4).map(float)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["integer", "number"]))
def test_bounds_are_met_exactly(data: st.DataObject, kind: str) -> None:
    """Of numbers near them exactly those between can be written."""
    low, high = sorted((data.draw(NUMBERS), data.draw(NUMBERS)))
    names = data.draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
    schema = {"type": kind, names[0]: low, names[1]: high}
    try:
        accept = accepts(to_ebnf(schema))
    except ValueError as error:
        assert "is within minimum and maximum" in str(error)  # noqa: PT017
        return
    for bound in (low, high):
        step = 1 if kind == "integer" else data.draw(st.sampled_from([1, 0.5, 0.0001, 0.000001]))
        for value in (bound, bound - step, bound + step, (low + high) / 2):
            value = int(value) if kind == "integer" else round(value, 6)
            text = str(value) if kind == "integer" else f"{value:.6f}".rstrip("0").rstrip(".")
            if text != "-0":
                assert accept(text) == follows(json.loads(text), schema), text


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (False, "#: false allows no value"),
        ([], "#: a schema must be an object"),
        ({"type": "strin"}, "#/type must be of object, array, string"),
        ({"minLenght": 3}, "#: the schema keyword 'minLenght' is not supported"),
        ({"type": "string", "maxLength": -1}, "#/maxLength must be an integer from 0 to"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "#: minLength is 3, which is more than maxLength, 1"),
        ({"type": "string", "pattern": "a", "maxLength": 1}, "#: 'pattern' beside 'maxLength' is not supported"),
        ({"type": "string", "pattern": "("}, "#/pattern: it is not valid"),
        ({"type": "string", "format": "color"}, "#/format must be one of date,"),
        ({"type": "integer", "multipleOf": 3}, "#: the schema keyword 'multipleOf' is not supported"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "#: no integer is within minimum and maximum"),
        ({"type": "integer", "minimum": 10**20}, "#/minimum must be a number within"),
        ({"type": "array", "uniqueItems": True}, "#: the schema keyword 'uniqueItems' is not supported"),
        ({"type": "array", "contains": {}}, "#: the schema keyword 'contains' is not supported"),
        ({"type": "array", "prefixItems": [True], "items": False, "minItems": 2}, "#: no array has at least 2"),
        ({"type": "object", "patternProperties": {}}, "#: the schema keyword 'patternProperties' is not supported"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "#/required: 'a' is not among"),
        ({"type": "object", "minProperties": 2}, "#: minProperties above 1 without properties is not supported"),
        ({"not": {}}, "#: the schema keyword 'not' is not supported"),
        ({"enum": []}, "#/enum allows no value"),
        ({"type": "integer", "const": "a"}, "#/const allows no value"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "#: 'anyOf' beside 'type' is not supported"),
        ({"allOf": [{}, {}]}, "#/allOf of more than one schema is not supported"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: it is not plain"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "#/oneOf: it is not plain"),
        ({"$ref": "other.json"}, "#/$ref must point into the schema"),
        ({"$ref": "#/$defs/a"}, "#/$ref: there is nothing at '#/$defs/a'"),
        ({"$ref": "#"}, "#: "),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "#: the schema refers to itself and to nothing else"),
        (
            {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            "#: no finite value follows this schema",
        ),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "#: no finite value follows this schema"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_its_place(schema: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        to_ebnf(schema)


def test_nesting_has_a_limit() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(MAX_DEPTH + 1):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DEPTH}"):
        to_ebnf(schema)
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested too deep"):
        to_ebnf(schema)


def test_only_characters_of_the_alphabet_are_written() -> None:
    alphabet = CharSet.of([(0x20, 0x7A)]) | CharSet.chars("{}")
    accept = accepts(to_ebnf({"type": "string"}, alphabet=alphabet))
    assert accept('"a"')
    assert not accept('"é"')
    with pytest.raises(ValueError, match="#/enum: this model's vocabulary cannot write 'é'"):
        to_ebnf({"enum": ["é"]}, alphabet=alphabet)
