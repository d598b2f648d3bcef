"""Owns the question whether a value can follow two JSON schemas at once, which `oneOf` forbids.

It is answered by the types that they allow and by the constants that tell objects apart; anything else is unclear.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_TYPES = frozenset(("object", "array", "string", "number", "boolean", "null"))


@dataclass(frozen=True, slots=True)
class Kind:
    """The types that a schema allows, and the values, as JSON, that it allows for a required property (by "/name"), or
    for itself (by "")."""

    types: frozenset[str]
    constants: Mapping[str, frozenset[str]]

    @classmethod
    def of(cls, schema: Any, follow: Callable[[Any], Any]) -> Kind:
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

    def excludes(self, other: Kind) -> bool:
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
