"""Owns what becomes of a JSON schema before llguidance gets it, which follows a schema to the letter or refuses it.

Refused here is what could cost the server too much, what llguidance would read inexactly, and what a user finds by its
place alone. Narrowed is what the standard leaves open and a model should not; never is anything made wider. Knows no
vocabulary, and imports no library of grammars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote

from llama2.text.exclusive import TYPES, kind_of

MAX_LENGTH = 100_000
MAX_PATTERN_LENGTH = 4096
MAX_DEPTH = 64
# llguidance follows nesting and references by recursion: a few thousand levels overflow the stack of a thread.
MAX_LEVELS = 600
# Each of them may come next, and a step looks at all that may.
MAX_OPTIONAL = 400
MAX_CASES = 100
# What n patterns allow together takes 2ⁿ to find out.
MAX_COMBINED_PATTERNS = 12
# llguidance holds numbers as doubles, and writes them as they were where they are no larger and have no more digits.
MAX_NUMBER = 2**53
MAX_DIGITS = 15

# How far from an exclusive bound a number stays, as long as doubles are that fine.
_STEP = 1e-6
_COARSE = 1e9

_SINGLE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
# What each keyword is about. It says nothing about values of other types.
_ABOUT = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
_COMBINING = {"anyOf", "oneOf", "allOf", "$ref"}
_CONSTRAINING = _COMBINING.union(("enum", "const"), *_ABOUT.values())
_UNSUPPORTED = {
    *("not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames"),
    *("dependencies", "dependentRequired", "dependentSchemas", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef"),
}
_NAMES = ("$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")

_DATE = "[0-9]{3}[1-9]-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])"
# Texts that every reader takes: so the 29th of a month is never written. llguidance has a 29th of February each year.
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def prepare(source: str, check_text: Callable[[str, str], None]) -> dict[str, Any]:
    """The schema that llguidance is to follow instead of the one that is given as JSON.

    Objects whose properties are declared, without a word about others, have these alone, unless the schema combines
    schemas. What says nothing of its type is of the type that its keywords are about.

    Args:
        check_text: called with each text that a reply may have to write and with its place in the schema; raises
            ValueError if it cannot.

    Raises:
        ValueError: it is no schema, is too large, or cannot be followed.
    """
    if len(source) > MAX_LENGTH:
        raise ValueError(f"the schema must have at most {MAX_LENGTH} characters, got {len(source)}")
    schema = json.loads(source)
    if schema is False:
        raise ValueError("#: false allows no value")
    schema = {} if schema is True else schema
    parts = _find_parts(schema)
    for part, place in parts:
        _check(part, place, check_text)
    combines = any(len(part.get("allOf", ())) > 1 or _combines(part) for part, _ in parts)
    patterns = {part[name] for part, _ in parts for name in ("pattern", "format") if name in part}
    patterns |= {pattern for part, _ in parts for pattern in part.get("patternProperties", ())}
    if combines and len(patterns) > MAX_COMBINED_PATTERNS:
        raise ValueError(f"a schema that combines schemas must have at most {MAX_COMBINED_PATTERNS} different patterns")
    # Before anything is narrowed: cases may not exclude each other because of that alone.
    for part, place in parts:
        if "oneOf" in part:
            _check_exclusive(part["oneOf"], schema, f"{place}/oneOf")
    for part, _ in parts:
        _narrow(part, closes=not combines)
    return schema


# ---- the schemas within a schema


def _find_parts(root: Any) -> list[tuple[dict[str, Any], str]]:
    """Each schema within `root`, and what references lead to, once and with its place.

    References are made absolute: afterwards it does not matter that a schema has an `$id`, where they begin.
    """
    found: list[tuple[dict[str, Any], str]] = []
    heights: dict[int, int] = {}
    targets: dict[int, tuple[Any, tuple[Any, str], str]] = {}

    def visit(schema: Any, resource: tuple[Any, str], place: str, depth: int) -> int:
        if isinstance(schema, bool):
            return 0
        if not isinstance(schema, dict):
            raise ValueError(f"{place}: a schema must be an object")
        if depth > MAX_DEPTH:
            raise ValueError(f"{place}: the schema is nested deeper than {MAX_DEPTH}")
        if id(schema) not in heights:
            if isinstance(schema.get("$id"), str):
                resource = schema, place
            heights[id(schema)] = 0
            found.append((schema, place))
            if "$ref" in schema:
                target = _resolve(schema["$ref"], resource, place)
                targets[id(target[0])] = target
                schema["$ref"] = quote(target[2], safe="#/~!$&'()*+,;=:@")
            below = [visit(part, resource, at, depth + 1) for part, at in _inside(schema, place)]
            heights[id(schema)] = 1 + max(below, default=0)
        return heights[id(schema)]

    levels = visit(root, (root, "#"), "#", 0)
    counted: set[int] = set()
    while fresh := targets.keys() - counted:
        counted |= fresh
        levels += sum(visit(*targets[key], 0) for key in fresh)
    if levels > MAX_LEVELS:
        raise ValueError(f"the schema is too large: through its references it may be nested {levels} deep")
    return found


def _inside(schema: dict[str, Any], place: str) -> Iterator[tuple[Any, str]]:
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((part, f"{place}/{name}/{index}") for index, part in enumerate(schema[name]))
        elif name in schema and name not in _SINGLE:
            raise ValueError(f"{place}/{name} must be a list of schemas")
    for name in _MAPS:
        if name not in schema:
            continue
        if not isinstance(schema[name], dict):
            raise ValueError(f"{place}/{name} must be an object of schemas")
        yield from ((part, f"{place}/{name}/{_escape(key)}") for key, part in schema[name].items())
    for name in _SINGLE:
        if name in schema and not isinstance(schema[name], list):
            yield schema[name], f"{place}/{name}"


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _resolve(reference: Any, resource: tuple[Any, str], place: str) -> tuple[Any, tuple[Any, str], str]:
    """What is there, the resource that it is part of, and its place."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        raise ValueError(f"{place}/$ref must point into the schema, as '#/$defs/name' does, got {reference!r}")
    target, at = resource
    for part in reference.split("/")[1:]:
        step = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and step in target:
            target = target[step]
        elif isinstance(target, list) and step.isdecimal() and int(step) < len(target):
            target = target[int(step)]
        else:
            raise ValueError(f"{place}/$ref: there is nothing at {reference!r}")
        at += f"/{_escape(step)}"
        if isinstance(target, dict) and isinstance(target.get("$id"), str):
            resource = target, at
    return target, resource, at


def _check_exclusive(cases: list[Any], root: Any, place: str) -> None:
    """oneOf forbids what two cases allow: it must be plain that there is no such value."""

    def target(schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema or _combines(schema):
                return schema
            schema, _, _ = _resolve(schema["$ref"], (root, "#"), place)
        return True

    kinds = [kind_of(case, target) for case in cases]
    for index, kind in enumerate(kinds):
        if not all(kind.excludes(other) for other in kinds[:index]):
            raise ValueError(
                f"{place}: it is not plain that its cases exclude each other; use anyOf, or give each of them a type, "
                "or a required property with a const, of its own"
            )


def _combines(schema: dict[str, Any]) -> bool:
    """Does it put what another schema says beside what it says itself?"""
    return bool(schema.keys() & _COMBINING) and len(schema.keys() & _CONSTRAINING) > 1


# ---- one schema


def _check(schema: dict[str, Any], place: str, check_text: Callable[[str, str], None]) -> None:
    for keyword in schema:
        if keyword in _UNSUPPORTED and not (keyword == "uniqueItems" and schema[keyword] is False):
            raise ValueError(f"{place}: the schema keyword {keyword!r} is not supported")
    types = schema.get("type", [*TYPES])
    types = [types] if isinstance(types, str) else types
    if not isinstance(types, list) or not types or not all(name in TYPES for name in types):
        raise ValueError(f"{place}/type must be of {', '.join(TYPES)}, got {schema['type']!r}")
    for name in ("pattern", "format"):
        if not isinstance(schema.get(name, ""), str):
            raise ValueError(f"{place}/{name} must be a string, got {schema[name]!r}")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{place}/required must be a list of names")
    properties = schema.get("properties", {})
    if len(properties.keys() - set(required)) > MAX_OPTIONAL:
        raise ValueError(f"{place}/properties must have at most {MAX_OPTIONAL} that are not required")
    # A key that is written twice counts once.
    if isinstance(schema.get("minProperties"), int) and schema["minProperties"] > max(1, len(set(required))):
        raise ValueError(f"{place}/minProperties above the number of required properties is not supported")
    cases = [
        case for case in schema.get("anyOf", ()) if not (isinstance(case, dict) and _is_plain(case.get("const", {})))
    ]
    if len(cases) > MAX_CASES or len(schema.get("oneOf", ())) > MAX_CASES:
        raise ValueError(f"{place}: anyOf and oneOf must have at most {MAX_CASES} cases; texts may be an enum")
    for name in _ABOUT["number"] & schema.keys():
        if not isinstance(schema[name], (int, float)):
            raise ValueError(f"{place}/{name} must be a number, got {schema[name]!r}")
        if not abs(schema[name]) <= MAX_NUMBER:
            raise ValueError(f"{place}/{name} must be within ±{MAX_NUMBER}, got {schema[name]!r}")
    _check_pattern(schema.get("pattern", ""), f"{place}/pattern", check_text)
    for pattern in schema.get("patternProperties", ()):
        _check_pattern(pattern, f"{place}/patternProperties", check_text)
    for name in (*properties, *required):
        check_text(json.dumps(name, ensure_ascii=False), f"{place}/properties/{_escape(name)}")
    for keyword, values in (("const", [schema.get("const")]), ("enum", schema.get("enum", [None]))):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{place}/enum must be a list of values")
        if sum(not _is_plain(value) for value in values) > MAX_CASES:
            raise ValueError(f"{place}/enum must have at most {MAX_CASES} arrays and objects")
        for value in values:
            _check_constant(value, f"{place}/{keyword}")
            check_text(json.dumps(value, ensure_ascii=False), f"{place}/{keyword}")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _check_pattern(pattern: str, place: str, check_text: Callable[[str, str], None]) -> None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(f"{place} must have at most {MAX_PATTERN_LENGTH} characters, got {len(pattern)}")
    check_text(pattern, place)


def _check_constant(value: Any, place: str) -> None:
    """All its numbers must be written as they are given."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_constant(item, place)
    elif isinstance(value, (int, float)) and not (abs(value) <= MAX_NUMBER and _is_short(value)):
        raise ValueError(f"{place} must be within ±{MAX_NUMBER} and have at most {MAX_DIGITS} digits, got {value!r}")


def _is_short(value: float) -> bool:
    return isinstance(value, int) or float(f"{value:.{MAX_DIGITS}g}") == value == round(value, MAX_DIGITS)


def _narrow(schema: dict[str, Any], *, closes: bool) -> None:
    _include_bounds(schema)
    if closes and "properties" in schema and not schema.keys() & {"additionalProperties", "patternProperties"}:
        for name in schema.get("required", ()):
            schema["properties"].setdefault(name, True)
        schema["additionalProperties"] = False
    if not schema.keys() & {"type", "enum", "const", *_COMBINING}:
        meant = [name for name, keywords in _ABOUT.items() if keywords & schema.keys()]
        schema.update({"type": meant} if meant else {})
    both = []
    if schema.get("format") in _FORMATS:
        both.append({"pattern": _FORMATS[schema.pop("format")]})
    if "oneOf" in schema:
        both.append({"anyOf": schema.pop("oneOf")})
    for one in both:
        if schema.keys() & one.keys():
            schema["allOf"] = [*schema.get("allOf", ()), one]
        else:
            schema.update(one)
    schema.pop("uniqueItems", None)
    for name in _NAMES:
        if isinstance(schema.get(name), str):
            del schema[name]


def _include_bounds(schema: dict[str, Any]) -> None:
    """llguidance allows 0 above an exclusive minimum of 0 and up to 0.5: whole bounds on the side of zero are included
    here. And draft 4 says by true and false whether a bound is exclusive."""
    for exclusive, inclusive, sign in (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1)):
        bound = schema.pop(exclusive, False)
        if bound is True:
            bound = schema.get(inclusive, False)
        if isinstance(bound, bool):
            continue
        if sign * bound < 0 or bound != int(bound):
            schema[exclusive] = bound
            continue
        stepped = bound + sign * (_STEP if abs(bound) < _COARSE else 1)
        others = [schema[inclusive]] if inclusive in schema else []
        schema[inclusive] = sign * max(sign * other for other in (stepped, *others))
