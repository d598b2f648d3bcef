"""A schema is followed to the letter, or refused by what is wrong with it. Random replies are checked in
test_grammar."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.text.grammar import GrammarCompiler
from llama2.text.json_schema import MAX_NUMBER
from llama2.text.tokenizer import Tokenizer
from tests.support.replies import accepts, follows

Allows = Callable[[Any, Any], bool]


@pytest.fixture(scope="session")
def compiler(sp: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(sp, sp.vocab_size)


@pytest.fixture(scope="session")
def allows(sp: Tokenizer, compiler: GrammarCompiler) -> Allows:
    """Whether a schema allows a value, or a text of JSON."""

    def ask(schema: Any, value: Any) -> bool:
        return accepts(sp, compiler.json_schema(schema), value if isinstance(value, str) else json.dumps(value))

    return ask


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a":1}', '{\n  "a": 1\n}', '{ "a" : 1 }'])
def test_white_space_is_as_people_write_json(allows: Allows, text: str) -> None:
    assert allows({"type": "object", "properties": {"a": {"type": "integer"}}}, text)


@pytest.mark.parametrize("text", ['{  "a":1}', '{\n\n"a":1}', '{"a":\t1}', ' {"a":1}', '{"a":1} '])
def test_and_bounded(allows: Allows, text: str) -> None:
    assert not allows({"type": "object", "properties": {"a": {"type": "integer"}}}, text)


def test_optional_properties_may_be_left_out_and_others_not_added(allows: Allows) -> None:
    schema = {"type": "object", "properties": {name: {"type": "null"} for name in "abcd"}, "required": ["b"]}
    for names in ("b", "ab", "bc", "bd", "abcd", "abd"):
        assert allows(schema, dict.fromkeys(names)), names
    for names in ("", "a", "acd", "ba", "be"):
        assert not allows(schema, dict.fromkeys(names)), names
    for names in ("b", "abe", "bef"):
        assert allows({**schema, "additionalProperties": True}, dict.fromkeys(names)), names


def test_combined_schemas_allow_each_others_properties(allows: Allows) -> None:
    """A property that one of them declares is an additional one for the other."""
    base = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    more = {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    for schema in (
        {"allOf": [{"$ref": "#/$defs/base"}, more], "$defs": {"base": base}},
        {"$ref": "#/$defs/base", **more, "$defs": {"base": base}},
    ):
        assert allows(schema, {"a": None, "b": True}) or allows(schema, {"b": True, "a": None}), schema
        assert not allows(schema, {"a": None})
        assert not allows(schema, {"a": None, "b": None})


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
                "anyOf": [{"$ref": "#/x-of/a/items"}],
                "x-of": {"a": {"$id": "a", "items": {"$ref": "#/$defs/n"}, "$defs": {"n": {"type": "null"}}}},
            },
            None,
        ),
        ({"type": "string", "format": "date", "pattern": "^2"}, "2024-02-28"),
        ({"$ref": "#/x-of/d%C3%A9 b/0", "x-of": {"dé b": [{"type": "null"}]}}, None),
        ({"anyOf": [{"const": 0.1}, {"const": -1e15}]}, 0.1),
        ({"anyOf": [{"const": index} for index in range(1000)]}, 999),
        ({"type": "array", "items": {"type": "null"}, "uniqueItems": False}, [None, None]),
        ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, "abc"),
        (
            {"type": "object", "properties": {"a": True}, "patternProperties": {"^x": {"type": "null"}}},
            {"a": 1, "xy": None},
        ),
        (
            {
                "type": "object",
                "properties": {"a": {"$id": "a", "$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}}},
            },
            {"a": None},
        ),
    ],
)
def test_schemas_that_allow(allows: Allows, schema: Any, value: Any) -> None:
    assert allows(schema, json.dumps(value) if isinstance(value, str) and not value.startswith("{") else value)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "string"}, '"\\ud800"'),
        ({"type": "string"}, '"\n"'),
        ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, '"abcd"'),
        ({"type": "string", "enum": ["a", 1]}, 1),
        ({"type": "integer"}, "1.5"),
        ({"type": "integer"}, "01"),
        ({"type": "number"}, "NaN"),
        ({"type": "number", "minimum": 0.1}, "0.099999"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, 0),
        ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
        ({"type": "number", "exclusiveMinimum": 3, "exclusiveMaximum": 3.5}, "3.0"),
        ({"type": "number", "exclusiveMinimum": 1e15, "maximum": 2e15}, "1000000000000000"),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, 0),
        ({"type": "object", "additionalProperties": False}, {"a": 1}),
        ({"type": "object", "required": ["a"]}, {}),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "time"}, '"23:59:60Z"'),
        ({"type": "string", "format": "date-time", "pattern": "^2"}, '"2023-02-29T00:00:00Z"'),
        ({"properties": {"a": {}}}, '"a"'),
        ({"minLength": 3}, 1),
        ({"type": "array", "prefixItems": [{"type": "null"}], "items": False}, [None, None]),
    ],
)
def test_schemas_that_forbid(allows: Allows, schema: Any, value: Any) -> None:
    assert not allows(schema, value)


NUMBERS = st.integers(-(10**6), 10**6) | st.decimals(-2000, 2000, places=4).map(float)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), kind=st.sampled_from(["integer", "number"]))
def test_bounds_are_met_exactly(sp: Tokenizer, compiler: GrammarCompiler, data: st.DataObject, kind: str) -> None:
    """Only the numbers between them can be written, some only with all six decimals."""
    low, high = sorted((data.draw(NUMBERS), data.draw(NUMBERS)))
    names = data.draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
    schema = {"type": kind, names[0]: low, names[1]: high}
    try:
        grammar = compiler.json_schema(schema)
    except ValueError as error:
        assert "Unsatisfiable schema" in str(error) or "range" in str(error)  # noqa: PT017
        return
    for bound in (low, high):
        step = 1 if kind == "integer" else data.draw(st.sampled_from([1, 0.5, 0.0001, 0.000001]))
        for value in (bound, bound - step, bound + step, (low + high) / 2):
            value = int(value) if kind == "integer" else round(value, 6) + 0.0  # no -0
            texts = [str(value)] if kind == "integer" else [f"{value:.6f}", f"{value:.6f}".rstrip("0").rstrip(".")]
            written = [accepts(sp, grammar, text) for text in texts]
            assert any(written) == follows(json.loads(texts[-1]), schema), texts


@settings(deadline=None, max_examples=60)
@given(
    factor=st.sampled_from([2, 3, 7, 10, 25, 0.5, 0.01, 0.25]),
    times=st.integers(-500, 500),
)
def test_multiples_are_met_exactly(allows: Allows, factor: float, times: int) -> None:
    schema = {"type": "number", "multipleOf": factor}
    decimals = {0.5: 1, 0.01: 2, 0.25: 2}.get(factor, 0)
    multiple = f"{times * factor:.{decimals}f}"
    assert allows(schema, multiple)
    assert not allows(schema, f"{(times + 0.5) * factor:.4f}")


@pytest.mark.parametrize(
    "annotation",
    [
        {"$comment": "c", "title": "t", "description": "d", "default": 1, "examples": [1], "deprecated": True},
        {"id": "a", "$id": "https://example.com/a", "$anchor": "b", "links": [{"href": "/"}], "x-order": 3},
        {"readOnly": True, "writeOnly": False, "example": 3, "discriminator": {"propertyName": "k"}},
        {"x-guidance": {"lenient": True, "whitespace_flexible": False}},
    ],
)
def test_what_only_annotates_changes_nothing(allows: Allows, annotation: Any) -> None:
    """At the top, inside, and as the name of a property."""
    inner = {"type": "object", "properties": {name: {"type": "null"} for name in annotation}, **annotation}
    schema = {"type": "array", "items": inner, "maxItems": 1, **annotation}
    assert allows(schema, [dict.fromkeys(annotation)])
    assert not allows(schema, [dict.fromkeys(annotation, 1)])
    assert not allows(schema, [{}, {}])


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        (False, "#: false allows no value"),
        ([], "#: a schema must be an object"),
        ({"items": {"anyOf": [3]}}, "#/items/anyOf/0: a schema must be an object"),
        ({"anyOf": {}}, "#/anyOf must be a list, got {}"),
        ({"properties": []}, "#/properties must be an object, got []"),
        ({"properties": {"a/b": {"required": "c"}}}, "#/properties/a~1b/required must be a list, got 'c'"),
        ({"type": "strin"}, "llguidance refuses it: Invalid type: strin"),
        ({"required": [3]}, "#/required must hold names, got [3]"),
        ({"oneOf": [{"type": [[]]}]}, "#/oneOf/0/type must hold names, got [[]]"),
        ({"type": "string", "pattern": 3}, "#/pattern must be a string, got 3"),
        *(
            ({"type": "array", "items": {keyword: {}}}, f'llguidance refuses it: Unimplemented keys: ["{keyword}"]')
            for keyword in (
                *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems"),
                *("propertyNames", "dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems"),
                *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
            )
        ),
        (
            {"minimum": MAX_NUMBER + 1},
            "#/minimum must be within ±9007199254740992, got 9007199254740993",
        ),
        ({"const": 0.1 + 0.2}, "#/const must be within ±9007199254740992 and have at most 15 digits, got 0.3"),
        (
            {"oneOf": [{"const": index} for index in range(101)]},
            "#: anyOf and oneOf must have at most 100 cases",
        ),
        ({"enum": [{"a": [10**20]}]}, "#/enum must be within ±9007199254740992 and have at most 15 digits, got 1"),
        ({"enum": []}, "llguidance refuses it: Unsatisfiable schema"),
        ({"const": float("nan")}, "#/const must be within"),
        ({"type": "object", "minProperties": 2}, "#/minProperties above the number of required"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: it is not plain"),
        ({"oneOf": [{"const": 1}, {"const": 1.0}]}, "#/oneOf: it is not plain"),
        ({"oneOf": [{"properties": {"a": {}}, "required": ["a"]}, {"properties": {}}]}, "#/oneOf: it is not plain"),
        ({"$ref": "other.json"}, "#/$ref must point into the schema"),
        ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "#/$ref must point into the schema"),
        ({"$ref": "#/$defs/a"}, "#/$ref: there is nothing at '#/$defs/a'"),
        ({"$ref": "#"}, "#: a value that follows it has no end"),
        ({"type": "string", "maxLength": -1}, "llguidance refuses it: Expected positive integer for 'maxLength'"),
        ({"type": "string", "minLength": 3, "maxLength": 1}, "llguidance refuses it: Unsatisfiable schema: minLength"),
        ({"type": "string", "pattern": "("}, "llguidance refuses it: '(': unclosed group"),
        ({"type": "string", "pattern": "a(?=b)"}, "llguidance refuses it: 'a(?=b)': look-around"),
        ({"type": "string", "pattern": r"(a)\1"}, r"llguidance refuses it: '(a)\\1': backreferences are not supported"),
        ({"type": "string", "format": "color"}, "llguidance refuses it: Unknown format: color"),
        ({"type": "integer", "minimum": 3, "maximum": 1}, "llguidance refuses it: Unsatisfiable schema: minimum (3)"),
        (
            {"type": "array", "prefixItems": [True], "items": False, "minItems": 2},
            "llguidance refuses it: Unsatisfiable",
        ),
        (
            {"type": "object", "required": ["a"], "additionalProperties": False},
            "llguidance refuses it: Unsatisfiable schema: required property 'a'",
        ),
        ({"type": "integer", "const": "a"}, "llguidance refuses it: Unsatisfiable schema: incompatible types"),
        ({"allOf": [{"type": "null"}, {"type": "string"}]}, "llguidance refuses it: Unsatisfiable schema"),
    ],
)
def test_what_cannot_be_followed_is_refused(compiler: GrammarCompiler, schema: Any, problem: str) -> None:
    """In one line, with its place where known."""
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}[^\n]*$"):
        compiler.json_schema(schema)


def test_narrowing_a_case_does_not_make_it_more_exclusive(compiler: GrammarCompiler, allows: Allows) -> None:
    """{"a": null} follows both, though it would not follow the second as it is written here."""
    cases = [{"type": "object", "properties": {name: {"type": "null"}}} for name in "ab"]
    cases[0]["required"] = ["a"]
    with pytest.raises(ValueError, match="#/oneOf: it is not plain"):
        compiler.json_schema({"oneOf": cases})
    assert allows({"anyOf": cases}, {"a": None})


@pytest.mark.parametrize("constant", [1, "a", True, None])
def test_cases_told_apart_by_a_constant_may_refer_to_themselves(allows: Allows, constant: Any) -> None:
    defs = {
        "leaf": {"type": "object", "properties": {"k": {"const": "leaf"}}, "required": ["k"]},
        "node": {
            "type": "object",
            "properties": {"k": {"const": constant}, "of": {"type": "array", "items": {"$ref": "#"}}},
            "required": ["k"],
        },
    }
    schema = {"oneOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/node"}], "$defs": defs}
    assert allows(schema, {"k": constant, "of": [{"k": "leaf"}, {"k": constant, "of": []}]})
    assert not allows(schema, {"k": "leaf", "of": []})


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"$ref": "#/$defs/node"},
        {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
        {"allOf": [{"$ref": "#/$defs/node"}, {"type": "object"}]},
        {"type": ["array", "object"], "prefixItems": [{"$ref": "#"}], "minItems": 1, **NODE},
        {"oneOf": [{"$ref": "#/$defs/node"}]},
    ],
)
def test_a_schema_whose_every_value_is_endless_is_refused(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^#: a value that follows it has no end$"):
        compiler.json_schema({**schema, "$defs": {"node": NODE}})


def test_where_a_schema_leaves_a_choice_what_is_endless_is_never_begun(allows: Allows) -> None:
    for schema, value in (
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/node"}, "b": {"type": "null"}}}, {"b": None}),
        ({"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}, None),
        ({"type": "array", "items": {"$ref": "#/$defs/node"}}, []),
        ({"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}}, {"a": {"a": None}}),
    ):
        grammar = {**schema, "$defs": {"node": NODE}}
        assert allows(grammar, value), schema
        assert not allows(grammar, '{"a": {"next": {"next": '), schema


def test_a_long_way_to_an_end_is_found_in_a_moment(compiler: GrammarCompiler) -> None:
    """Backwards, too: each of many parts ends when the one before it does."""
    links = 500
    defs = {f"d{index}": {"$ref": f"#/$defs/d{index + 1}"} for index in range(links)}
    waiting = [{"$ref": "#/$defs/d0"} for _ in range(1500)]
    start = time.process_time()
    compiler.json_schema({"type": "array", "prefixItems": waiting, "$defs": {**defs, f"d{links}": {"type": "null"}}})
    assert time.process_time() - start < 2
