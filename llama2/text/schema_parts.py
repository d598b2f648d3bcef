"""Owns the schemas within a JSON schema: which there are, where they stand, and where references lead.

Knows no value and no library of grammars.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from llama2.errors import shown

MAX_DEPTH = 64
# llguidance follows nesting and references by recursion: a few thousand levels overflow the stack of a thread.
MAX_LEVELS = 600

NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# What each keyword is about. It says nothing about values of other types.
ABOUT = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {*NUMBERS},
}
COMBINING = {"anyOf", "oneOf", "allOf", "$ref"}
CONSTRAINING = COMBINING.union(("enum", "const"), *ABOUT.values())
_SINGLE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("prefixItems", "items", "anyOf", "oneOf", "allOf")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_SHAPES: dict[str, tuple[type | tuple[type, ...], tuple[str, ...]]] = {
    "a string": (str, ("pattern", "format")),
    "a list": (list, ("prefixItems", "anyOf", "oneOf", "allOf", "enum", "required")),
    "an object": (dict, _MAPS),
    "a number": ((int, float), (*NUMBERS, "minProperties", "minItems")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A schema within a schema. `target` is what its reference leads to."""

    schema: dict[str, Any]
    place: str
    target: Any

    @property
    def combines(self) -> bool:
        """Does it put what another schema says beside what it says itself?"""
        keywords = self.schema.keys()
        return bool(keywords & COMBINING) and len(keywords & CONSTRAINING) > 1

    @property
    def types(self) -> list[str]:
        """What values of it may be; where it says nothing of that, its keywords do."""
        types = (
            self.schema.get("type")
            or [name for name, keywords in ABOUT.items() if keywords & self.schema.keys()]
            or [*ABOUT]
        )
        return [types] if isinstance(types, str) else types


def find_parts(root: Any) -> list[Part]:
    """Each schema within `root`, and what references lead to, once. The first is `root`.

    References are made absolute: afterwards it does not matter that a schema has an `$id`, where they begin.
    """
    found: list[Part] = []
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
            _check_shapes(schema, place)
            if isinstance(schema.get("$id"), str):
                resource = schema, place
            heights[id(schema)] = 0
            target = _resolve(schema["$ref"], resource, place) if "$ref" in schema else None
            found.append(Part(schema=schema, place=place, target=target and target[0]))
            if target:
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
    for name in _MAPS:
        yield from ((part, f"{place}/{name}/{escape(key)}") for key, part in schema.get(name, {}).items())
    for name in _SINGLE:
        if name in schema and not isinstance(schema[name], list):
            yield schema[name], f"{place}/{name}"


def escape(name: str) -> str:
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
        at += f"/{escape(step)}"
        if isinstance(target, dict) and isinstance(target.get("$id"), str):
            resource = target, at
    return target, resource, at


def _check_shapes(schema: dict[str, Any], place: str) -> None:
    """As far as what comes before llguidance must rely on them."""
    for words, (kind, names) in _SHAPES.items():
        for name in names:
            if name in schema and not isinstance(schema[name], kind):
                raise ValueError(f"{place}/{name} must be {words}, got {shown(schema[name])}")
    for name in ("type", "required"):
        values = schema.get(name, [])
        if not all(isinstance(value, str) for value in (values if isinstance(values, list) else [values])):
            raise ValueError(f"{place}/{name} must hold names, got {shown(values)}")
