"""Owns what becomes of a JSON schema before llguidance gets it, which follows a schema to the letter or refuses it.

Refused here is what could cost the server too much, and what llguidance would read inexactly. Narrowed is what the
standard leaves open and a model should not; never is anything made wider. Knows no vocabulary, and imports no library
of grammars.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama2.text.schema_parts import COMBINING, CONSTRAINING, MAX_DEPTH, NUMBERS, Part, escape, find_parts

MAX_LENGTH = 100_000
MAX_PATTERN_LENGTH = 4096
# Each of them may come next, and a step looks at all that may.
MAX_OPTIONAL = 400
MAX_CASES = 100
# What n patterns allow together takes 2ⁿ to find out.
MAX_COMBINED_PATTERNS = 12
# llguidance holds numbers as doubles, and writes them as they were where they are no larger and have no more digits.
# A larger integer becomes its neighbour, and one near -2**63 ends the process (llguidance 1.9.1).
MAX_NUMBER = 2**53
MAX_DIGITS = 15

# How far from an exclusive bound a number stays, as long as doubles are that fine.
_STEP = 1e-6
_COARSE = 1e9

# What can exclude each other.
_TYPES = frozenset(("object", "array", "string", "number", "boolean", "null"))
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
        ValueError: it is no schema, is too large, cannot be followed, or can only be followed without end.
    """
    if len(source) > MAX_LENGTH:
        raise ValueError(f"the schema must have at most {MAX_LENGTH} characters, got {len(source)}")
    schema = json.loads(source)
    if schema is False:
        raise ValueError("#: false allows no value")
    schema = {} if schema is True else schema
    parts = find_parts(schema)
    for part in parts:
        _check(part.schema, part.place, check_text)
    combines = any(len(part.schema.get("allOf", ())) > 1 or part.combines for part in parts)
    patterns = {part.schema[name] for part in parts for name in ("pattern", "format") if name in part.schema}
    patterns |= {pattern for part in parts for pattern in part.schema.get("patternProperties", ())}
    if combines and len(patterns) > MAX_COMBINED_PATTERNS:
        raise ValueError(f"a schema that combines schemas must have at most {MAX_COMBINED_PATTERNS} different patterns")
    # Before anything is narrowed: cases may not exclude each other because of that alone.
    _check_exclusive(parts)
    _drop_endless(parts)
    for part in parts:
        _narrow(part, closes=not combines)
    return schema


# ---- values that cannot be


@dataclass(frozen=True, slots=True)
class _Kind:
    """The types that a schema allows, and the values, as JSON, that it allows for a required property (by "/name"), or
    for itself (by "")."""

    types: frozenset[str]
    constants: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, schema: Any, follow: Callable[[Any], Any]) -> _Kind:
        """What is plain of `schema`; `follow` leads from a reference to its target."""
        schema = follow(schema)
        if not isinstance(schema, Mapping) or schema.keys() & {"anyOf", "oneOf", "allOf"}:
            return cls(_TYPES, {})
        properties = schema.get("properties", {})
        constants = {f"/{name}": _constants(follow(properties.get(name))) for name in schema.get("required", ())}
        constants[""] = _constants(schema)
        types = schema.get("type", _TYPES)
        types = [types] if isinstance(types, str) else types
        return cls(
            frozenset("number" if name == "integer" else name for name in types),
            {key: values for key, values in constants.items() if values is not None},
        )

    def excludes(self, other: _Kind) -> bool:
        types = self.types & other.types
        shared = self.constants.keys() & other.constants.keys()
        apart = [key for key in shared if not self.constants[key] & other.constants[key]]
        return not types or "" in apart or (types == {"object"} and bool(apart))


def _constants(schema: Any) -> frozenset[str] | None:
    """The values that an enum or const allows, as JSON; None where there is neither."""
    if not isinstance(schema, Mapping) or not ("const" in schema or isinstance(schema.get("enum"), list)):
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return frozenset(map(_canonical, values))


def _canonical(value: Any) -> str:
    whole = isinstance(value, float) and value.is_integer()
    return json.dumps(int(value) if whole else value, sort_keys=True)


def _check_exclusive(parts: list[Part]) -> None:
    """oneOf forbids what two cases allow: it must be plain that there is no such value."""
    part_of = {id(part.schema): part for part in parts}

    def follow(schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, dict) or "$ref" not in schema or part_of[id(schema)].combines:
                return schema
            schema = part_of[id(schema)].target
        return True

    for part in parts:
        kinds = [_Kind.of(case, follow) for case in part.schema.get("oneOf", ())]
        for index, kind in enumerate(kinds):
            if not all(kind.excludes(other) for other in kinds[:index]):
                raise ValueError(
                    f"{part.place}/oneOf: it is not plain that its cases exclude each other; use anyOf, or give each "
                    "of them a type, or a required property with a const, of its own"
                )


def _drop_endless(parts: list[Part]) -> None:
    """Allow nothing where each value would have to hold another one without end."""
    ending: set[int] = set()
    endless = parts
    while True:
        for part in reversed(endless):  # what is inside comes later
            if _may_end(part, lambda schema: isinstance(schema, bool) or id(schema) in ending):
                ending.add(id(part.schema))
        left = [part for part in endless if id(part.schema) not in ending]
        if len(left) == len(endless):
            break
        endless = left
    if any(part is parts[0] for part in endless):
        raise ValueError("#: a value that follows it has no end")
    for part in endless:
        part.schema.clear()
        part.schema["enum"] = []


def _may_end(part: Part, ends: Callable[[Any], bool]) -> bool:
    schema = part.schema
    if schema.keys() & {"enum", "const"}:
        return True
    cases = [schema[name] for name in ("anyOf", "oneOf") if name in schema]
    if not all(map(ends, [*schema.get("allOf", ()), *([part.target] if "$ref" in schema else [])])):
        return False
    if not all(any(map(ends, of_one)) for of_one in cases):
        return False
    items, least = schema.get("items", True), int(schema.get("minItems", 0))
    first, rest = (items, schema.get("additionalItems", True)) if isinstance(items, list) else ([], items)
    first = schema.get("prefixItems", first)
    needed = {
        "object": [schema.get("properties", {}).get(name, True) for name in schema.get("required", ())],
        "array": [*first[:least], *([rest] if least > len(first) else [])],
    }
    return any(all(map(ends, needed.get(name, ()))) for name in part.types)


# ---- one schema


def _check(schema: dict[str, Any], place: str, check_text: Callable[[str, str], None]) -> None:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if len(properties.keys() - set(required)) > MAX_OPTIONAL:
        raise ValueError(f"{place}/properties must have at most {MAX_OPTIONAL} that are not required")
    # A key that is written twice counts once.
    if schema.get("minProperties", 0) > max(1, len(set(required))):
        raise ValueError(f"{place}/minProperties above the number of required properties is not supported")
    cases = [
        case for case in schema.get("anyOf", ()) if not (isinstance(case, dict) and _is_plain(case.get("const", {})))
    ]
    if len(cases) > MAX_CASES or len(schema.get("oneOf", ())) > MAX_CASES:
        raise ValueError(f"{place}: anyOf and oneOf must have at most {MAX_CASES} cases; texts may be an enum")
    for name in (*NUMBERS, "minItems"):
        if not abs(schema.get(name, 0)) <= MAX_NUMBER:
            raise ValueError(f"{place}/{name} must be within ±{MAX_NUMBER}, got {schema[name]!r}")
    for name, patterns in (
        ("pattern", [schema.get("pattern", "")]),
        ("patternProperties", schema.get("patternProperties", ())),
    ):
        for pattern in patterns:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise ValueError(
                    f"{place}/{name} must have at most {MAX_PATTERN_LENGTH} characters, got {len(pattern)}"
                )
            check_text(pattern, f"{place}/{name}")
    for name in (*properties, *required):
        check_text(json.dumps(name, ensure_ascii=False), f"{place}/properties/{escape(name)}")
    for name, values in (("const", [schema.get("const")]), ("enum", schema.get("enum", ()))):
        if sum(not _is_plain(value) for value in values) > MAX_CASES:
            raise ValueError(f"{place}/enum must have at most {MAX_CASES} arrays and objects")
        for value in values:
            _check_constant(value, f"{place}/{name}")
            check_text(json.dumps(value, ensure_ascii=False), f"{place}/{name}")


def _is_plain(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _check_constant(value: Any, place: str) -> None:
    """All its numbers must be written as they are given."""
    if isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_constant(item, place)
    elif isinstance(value, (int, float)) and not (abs(value) <= MAX_NUMBER and _is_short(value)):
        raise ValueError(f"{place} must be within ±{MAX_NUMBER} and have at most {MAX_DIGITS} digits, got {value!r}")


def _is_short(value: float) -> bool:
    return isinstance(value, int) or float(f"{value:.{MAX_DIGITS}g}") == value == round(value, MAX_DIGITS)


def _narrow(part: Part, *, closes: bool) -> None:
    schema = part.schema
    _include_bounds(schema)
    if closes and "properties" in schema and not schema.keys() & {"additionalProperties", "patternProperties"}:
        for name in schema.get("required", ()):
            schema["properties"].setdefault(name, True)
        schema["additionalProperties"] = False
    if not schema.keys() & {"type", "enum", "const", *COMBINING}:
        schema.update({"type": part.types} if schema.keys() & CONSTRAINING else {})
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
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
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
