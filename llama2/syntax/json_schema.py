"""Owns the way from a JSON schema to a grammar all of whose texts follow it.

The grammar may be narrower than the schema, never wider: objects are written with their declared properties only and in
their order, numbers with as many digits as every reader takes, white space is bounded. A keyword that this cannot hold
to is refused by its name and place; annotations (`title`, `description`, ...) are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama2.syntax import regex
from llama2.syntax.charset import ALL, CharSet, as_ebnf
from llama2.syntax.exclusive import TYPES, kind_of
from llama2.syntax.json_numbers import integer_rule, number_rule

MAX_LENGTH = 100_000
MAX_DEPTH = 64
MAX_RULES = 2_000
MAX_COUNT = 10_000
# What is counted costs a state for each step, and each state costs a look at the whole vocabulary.
MAX_STATES = 300
MAX_CHARACTERS = 1_000
_STATES_OF_COUNT = 200  # however much is counted
# How many cases may be open at once, for they are followed side by side.
MAX_CASES = 100

_ANNOTATIONS = frozenset(
    ("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly")
) | frozenset(("discriminator", "$schema", "$id", "$comment", "$defs", "definitions"))
# What each keyword is about. It says nothing about values of other types.
_KEYWORDS = {
    "object": frozenset(("properties", "required", "additionalProperties", "minProperties", "maxProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems", "uniqueItems")),
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
}
_KEYWORDS["integer"] = _KEYWORDS["number"]
_CHOICES = frozenset(("enum", "const", "anyOf", "oneOf", "allOf", "$ref"))
_KNOWN = frozenset(("type",)).union(_ANNOTATIONS, _CHOICES, *_KEYWORDS.values())

_DATE = "[0-9]{3}[1-9]-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])"
_NUMBER_TO_255 = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?"
# Of each format texts that every reader of it takes: so the 29th of a month is never written.
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([1-9][0-9]{0,2}D(T[1-9][0-9]?[HMS])?|T[1-9][0-9]{0,3}[HMS])",
    "email": rf"[a-z0-9]+([._+-][a-z0-9]+)*@{_LABEL}(\.{_LABEL}){{0,2}}\.[a-z]{{2,6}}",
    "hostname": rf"{_LABEL}(\.{_LABEL}){{0,2}}\.[a-z]{{2,6}}",
    "ipv4": rf"{_NUMBER_TO_255}(\.{_NUMBER_TO_255}){{3}}",
    "ipv6": "[0-9a-f]{1,4}(:[0-9a-f]{1,4}){7}",
    "uri": rf"https?://{_LABEL}(\.{_LABEL}){{0,2}}\.[a-z]{{2,6}}(/[A-Za-z0-9._~-]*)*(\?[A-Za-z0-9._~=&-]*)?",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}


def to_ebnf(schema: Any, *, alphabet: CharSet = ALL) -> str:
    """The grammar of `schema`; its first rule is `root`. `alphabet` are the characters that can be written.

    Raises:
        ValueError: it is no valid schema, is too large, has a keyword that is not supported, or allows no value.
    """
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("the schema is no JSON, or is nested too deep") from None
    if size > MAX_LENGTH:
        raise ValueError(f"the schema must have at most {MAX_LENGTH} characters, got {size}")
    writer = _Writer(alphabet)
    root = writer.value(schema, schema, "#", 0)
    writer.check_endings()
    return "\n".join([f"root ::= {root}", *writer.lines])


class _Writer:
    """Collects rules; a schema that is met again, by a reference, is the same rule."""

    def __init__(self, alphabet: CharSet) -> None:
        self.lines: list[str] = []
        self._alphabet = alphabet
        self._names: dict[tuple[int, int], str] = {}
        self._shared: dict[str, str] = {}
        self._num_states = 0
        # Rules that are nothing but other rules; and how many cases may be open at once inside of a rule.
        self._stands_for: dict[str, list[str]] = {}
        self._cases_of: dict[str, int] = {}
        self._inner_cases = 1
        # For each rule the alternatives, each as the rules without which it does not end; and where it comes from.
        self._needs: dict[str, list[set[str]]] = {}
        self._places: dict[str, str] = {}

    def value(self, schema: Any, root: Any, place: str, depth: int) -> str:
        """The name of the rule for the values of `schema`, whose references are to be looked up in `root`."""
        if depth > MAX_DEPTH:
            raise ValueError(f"{place}: the schema is nested deeper than {MAX_DEPTH}")
        if isinstance(schema, Mapping) and isinstance(schema.get("$id"), str):
            root = schema
        key = (id(schema), id(root))
        if schema is True or schema == {}:
            return self._any()
        if not isinstance(schema, Mapping):
            raise ValueError(
                f"{place}: " + ("false allows no value" if schema is False else "a schema must be an object")
            )
        if key in self._names:
            self._inner_cases = max(self._inner_cases, self._cases_of.get(self._names[key], 1))
        else:
            name = self._names[key] = self._new_name(place)
            outer, self._inner_cases = self._inner_cases, 1
            options, needs = self._options(schema, root, place, depth)
            if schema.keys() & _CHOICES - {"enum", "const"}:
                self._stands_for[name] = options
                self._inner_cases = sum(self._cases_of.get(option, 1) for option in options)
            if self._inner_cases > MAX_CASES:
                raise ValueError(
                    f"{place}: the schema is too ambiguous: more than {MAX_CASES} cases may be open at once"
                )
            self._cases_of[name] = self._inner_cases
            self._inner_cases = max(outer, self._inner_cases)
            self._add(name, options, needs)
        return self._names[key]

    def check_endings(self) -> None:
        """Every rule must be able to come to an end, and none may be itself again before a character is written."""
        ending: set[str] = set()
        before = -1
        while before < len(ending):
            before = len(ending)
            ending |= {name for name, options in self._needs.items() if any(needs <= ending for needs in options)}
        for name, place in self._places.items():
            if name not in ending:
                raise ValueError(f"{place}: no finite value follows this schema, which contains itself")
        circle = dict(self._stands_for)
        while solid := [name for name, others in circle.items() if not circle.keys() & others]:
            for name in solid:
                del circle[name]
        if circle:
            raise ValueError(f"{self._places[min(circle)]}: the schema refers to itself and to nothing else")

    # ---- rules

    def _new_name(self, place: str) -> str:
        if len(self._places) >= MAX_RULES:
            raise ValueError(f"the schema is too large: it needs more than {MAX_RULES} rules")
        name = f"r{len(self._places)}"
        self._places[name] = place
        return name

    def _add(self, name: str, options: Sequence[str], needs: Sequence[set[str]]) -> None:
        self.lines.append(f"{name} ::= {' | '.join(options)}")
        self._needs[name] = list(needs)

    def _rule(self, place: str, *options: str) -> str:
        """A rule of characters alone."""
        name = self._new_name(place)
        self._add(name, options, [set()])
        return name

    def _count_states(self, number: int, place: str) -> None:
        self._num_states += number
        if self._num_states > MAX_STATES:
            raise ValueError(f"{place}: the patterns and lengths of the schema's strings are too large together")

    def _share(self, key: str, *options: str) -> str:
        """The rule for something that is the same wherever it occurs."""
        if key not in self._shared:
            self._shared[key] = self._rule(key, *options)
        return self._shared[key]

    def _space(self) -> str:
        return self._share("white space", '""', '" "', '"\\n" [ ]{0,24}')

    def _literal(self, text: str, place: str) -> str:
        for character in text:
            if character not in self._alphabet:
                raise ValueError(f"{place}: this model's vocabulary cannot write {character!r}")
        return as_ebnf(text)

    def _character(self) -> str:
        return self._share("a character", regex.json_character(self._alphabet & regex.JSON_CHARACTERS))

    def _string(self) -> str:
        return self._share("a string", f'"\\"" {self._character()}* "\\""')

    def _any(self) -> str:
        if "a value" not in self._shared:
            name = self._shared["a value"] = self._new_name("a value")
            space, string = self._space(), self._string()
            pair = f'{string} {space} ":" {space} {name}'
            options = [
                string,
                self._share("a number", number_rule({}, "#")),
                *('"true"', '"false"', '"null"'),
                f'"[" {space} "]"',
                f'"[" {space} {name} ({space} "," {space} {name})* {space} "]"',
                f'"{{" {space} "}}"',
                f'"{{" {space} {pair} ({space} "," {space} {pair})* {space} "}}"',
            ]
            self._add(name, options, [set()])
        return self._shared["a value"]

    # ---- what a schema says

    def _options(
        self, schema: Mapping[str, Any], root: Any, place: str, depth: int
    ) -> tuple[list[str], list[set[str]]]:
        """The alternatives of a schema's rule, and for each of them the rules that it needs."""
        for keyword in schema:
            if keyword not in _KNOWN and not keyword.startswith("x-"):
                raise ValueError(f"{place}: the schema keyword {keyword!r} is not supported")
        chosen = [keyword for keyword in schema if keyword in _CHOICES]
        if chosen:
            beside = [name for name in schema if name not in _ANNOTATIONS and name != chosen[0]]
            if [*beside] not in ([], ["type"]) or (beside and chosen[0] not in ("enum", "const")):
                raise ValueError(f"{place}: {chosen[0]!r} beside {beside[0]!r} is not supported")
            if chosen[0] in ("enum", "const"):
                return self._constants(schema, chosen[0], place)
            names = [self.value(*case, depth + 1) for case in self._cases(schema, chosen[0], root, place)]
            return names, [{name} for name in names]
        types = self._types(schema, place)
        rules = [self._of_type(type_name, schema, root, place, depth) for type_name in types]
        return [rule for rule, _ in rules], [needs for _, needs in rules]

    def _types(self, schema: Mapping[str, Any], place: str) -> list[str]:
        types = schema.get("type")
        if types is None:  # the keywords say what is meant
            types = [name for name in TYPES if name != "integer" and _KEYWORDS.get(name, frozenset()) & schema.keys()]
            types = types or [name for name in TYPES if name != "integer"]
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, list) or not types or not all(name in TYPES for name in types):
            raise ValueError(f"{place}/type must be of {', '.join(TYPES)}, got {schema['type']!r}")
        return types

    def _constants(self, schema: Mapping[str, Any], keyword: str, place: str) -> tuple[list[str], list[set[str]]]:
        values = schema["enum"] if keyword == "enum" else [schema["const"]]
        if not isinstance(values, list):
            raise ValueError(f"{place}/enum must be a list")
        types = self._types(schema, place) if "type" in schema else None
        values = [value for value in values if types is None or any(_is_a(value, name) for name in types)]
        if not values:
            raise ValueError(f"{place}/{keyword} allows no value")
        try:
            texts = {json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values}
        except ValueError:
            raise ValueError(f"{place}/{keyword} has a number that is no JSON") from None
        return [self._literal(text, f"{place}/{keyword}") for text in sorted(texts)], [set()]

    def _cases(self, schema: Mapping[str, Any], keyword: str, root: Any, place: str) -> list[tuple[Any, Any, str]]:
        """The schemas one of which holds, each with its root and place."""
        if keyword == "$ref":
            return [self._resolve(schema["$ref"], root, place)]
        cases = schema[keyword]
        if not isinstance(cases, list) or not cases:
            raise ValueError(f"{place}/{keyword} must be a list of schemas")
        if keyword == "allOf" and len(cases) > 1:
            raise ValueError(f"{place}/allOf of more than one schema is not supported")
        if keyword == "oneOf":
            self._check_exclusive(cases, root, f"{place}/oneOf")
        different = {json.dumps(case): (case, root, f"{place}/{keyword}/{index}") for index, case in enumerate(cases)}
        return list(different.values())

    def _resolve(self, reference: Any, root: Any, place: str) -> tuple[Any, Any, str]:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise ValueError(f"{place}/$ref must point into the schema, as '#/$defs/name' does, got {reference!r}")
        target = root
        for part in reference.split("/")[1:]:
            step = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                target = target[int(step)]
            else:
                raise ValueError(f"{place}/$ref: there is nothing at {reference!r}")
        return target, root, reference

    def _check_exclusive(self, cases: list[Any], root: Any, place: str) -> None:
        """oneOf forbids what two cases allow: it must be plain that there is no such value."""

        def target(schema: Any) -> Any:
            for _ in range(MAX_DEPTH):
                if not isinstance(schema, Mapping) or "$ref" not in schema:
                    return schema
                schema, _, _ = self._resolve(schema["$ref"], root, place)
            return True

        kinds = [kind_of(case, target) for case in cases]
        for index, kind in enumerate(kinds):
            if not all(kind.excludes(other) for other in kinds[:index]):
                raise ValueError(
                    f"{place}: it is not plain that its cases exclude each other; use anyOf, or give each of them "
                    "a type, or a required property with a const, of its own"
                )

    # ---- types

    def _of_type(
        self, type_name: str, schema: Mapping[str, Any], root: Any, place: str, depth: int
    ) -> tuple[str, set[str]]:
        if type_name == "object":
            return self._object(schema, root, place, depth)
        if type_name == "array":
            return self._array(schema, root, place, depth)
        if type_name == "string":
            return self._text(schema, place), set()
        if type_name == "boolean":
            return '("true" | "false")', set()
        if type_name == "null":
            return '"null"', set()
        return (integer_rule if type_name == "integer" else number_rule)(schema, place), set()

    def _text(self, schema: Mapping[str, Any], place: str) -> str:
        given = [name for name in ("pattern", "format", "minLength", "maxLength") if name in schema]
        if given and given[0] in ("pattern", "format"):
            if len(given) > 1:
                raise ValueError(f"{place}: {given[0]!r} beside {given[1]!r} is not supported")
            pattern = schema[given[0]] if given[0] == "pattern" else _FORMATS.get(schema["format"])
            if not isinstance(pattern, str):
                allowed = "a string" if given[0] == "pattern" else f"one of {', '.join(_FORMATS)}"
                raise ValueError(f"{place}/{given[0]} must be {allowed}, got {schema[given[0]]!r}")
            return f'"\\"" {self._pattern(pattern, f"{place}/{given[0]}")} "\\""'
        low, high = self._counts(schema, "minLength", "maxLength", place)
        if low == 0 and high is None:
            return self._string()
        if low > MAX_CHARACTERS:
            raise ValueError(f"{place}/minLength must be at most {MAX_CHARACTERS}, got {low}")
        high = None if high is None else min(high, MAX_CHARACTERS)
        key = f"{low} to {high} characters"
        if key not in self._shared:
            self._count_states(min(high or low, _STATES_OF_COUNT), place)
            plain = (self._alphabet & regex.JSON_PLAIN).as_ebnf()  # without escapes, to be counted fast
            self._share(key, f'"\\"" {plain}{_repeat(low, high)} "\\""')
        return self._shared[key]

    def _pattern(self, pattern: str, place: str) -> str:
        key = f"pattern {pattern}"
        if key not in self._shared:
            name = self._shared[key] = self._new_name(place)
            try:
                rules = regex.to_rules(pattern, name, alphabet=self._alphabet, in_json=True)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            self._count_states(len(rules), place)
            self.lines += rules
            self._needs[name] = [set()]
        return self._shared[key]

    def _array(self, schema: Mapping[str, Any], root: Any, place: str, depth: int) -> tuple[str, set[str]]:
        low, high = self._counts(schema, "minItems", "maxItems", place)
        if schema.get("uniqueItems", False) is not False:
            raise ValueError(f"{place}: the schema keyword 'uniqueItems' is not supported")
        prefix = schema.get("prefixItems", [])
        if not isinstance(prefix, list):
            raise ValueError(f"{place}/prefixItems must be a list of schemas")
        if high is not None and high < len(prefix):
            prefix = prefix[:high]
        space = self._space()
        comma = f'{space} "," {space}'
        items = [self.value(item, root, f"{place}/prefixItems/{index}", depth + 1) for index, item in enumerate(prefix)]
        # Behind a prefix nothing is written that need not be.
        rest = schema.get("items", True)
        low, high = max(low - len(items), 0), None if high is None else high - len(items)
        if rest is False or (items and "items" not in schema):
            high = low if rest is not False else 0
        if high is not None and low > high:
            raise ValueError(f"{place}: no array has at least {low + len(items)} of these items")
        needs = set(items)
        parts = f" {comma} ".join(items)
        if high == 0:
            return (f'"[" {space} {parts} {space} "]"' if items else f'"[" {space} "]"'), needs
        item = self.value(rest, root, f"{place}/items", depth + 1)
        needs |= {item} if low else set()
        if items:
            return f'"[" {space} {parts} ({comma} {item}){_repeat(low, high)} {space} "]"', needs
        more = _repeat(max(low - 1, 0), None if high is None else high - 1)
        some = f"{item} ({comma} {item}){more} {space}"
        return f'"[" {space} {some if low else f"({some})?"} "]"', needs

    def _object(self, schema: Mapping[str, Any], root: Any, place: str, depth: int) -> tuple[str, set[str]]:
        low, high = self._counts(schema, "minProperties", "maxProperties", place)
        properties, required = schema.get("properties", {}), schema.get("required", [])
        extra = schema.get("additionalProperties", True)
        if not isinstance(properties, Mapping):
            raise ValueError(f"{place}/properties must be an object of schemas")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise ValueError(f"{place}/required must be a list of names")
        declared = dict(properties)
        for name in required:
            if name not in declared and extra is False:
                raise ValueError(f"{place}/required: {name!r} is not among the properties")
            declared.setdefault(name, extra)
        if not declared and "properties" not in schema and extra is not False:
            return self._map(extra, low, high, root, place, depth)
        needed = set(required)
        if low > len(needed) or (high is not None and high < len(declared)):
            raise ValueError(f"{place}: minProperties and maxProperties beside properties are not supported")
        space = self._space()
        # From the end: what may follow when something was written before, and when nothing was.
        after, begin = f'{space} "}}"', '"}"'
        needs: set[str] = set()
        for name, item in reversed(declared.items()):
            item_place = f"{place}/properties/{name}"
            key = self._literal(json.dumps(name, ensure_ascii=False), item_place)
            value = self.value(item, root, item_place, depth + 1)
            pair = f'{key} {space} ":" {space} {value}'
            needs |= {value} if name in needed else set()
            rest = self._rule(item_place, after)
            first, further = f"{pair} {rest}", f'{space} "," {space} {pair} {rest}'
            if name in needed:
                begin, after = first, further
            else:
                begin = self._rule(item_place, first, begin)
                after = self._rule(item_place, further, rest)
        return f'"{{" {space} {begin}', needs

    def _map(self, extra: Any, low: int, high: int | None, root: Any, place: str, depth: int) -> tuple[str, set[str]]:
        if low > 1:  # a key written twice counts once
            raise ValueError(f"{place}: minProperties above 1 without properties is not supported")
        space = self._space()
        if high == 0:
            return f'"{{" {space} "}}"', set()
        value = self.value(extra, root, f"{place}/additionalProperties", depth + 1)
        pair = f'{self._string()} {space} ":" {space} {value}'
        some = f'{pair} ({space} "," {space} {pair}){_repeat(0, None if high is None else high - 1)} {space}'
        return f'"{{" {space} {some if low else f"({some})?"} "}}"', {value} if low else set()

    def _counts(self, schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
        low, high = schema.get(least, 0), schema.get(most)
        for name, count in ((least, low), (most, high)):
            if name in schema and (
                not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MAX_COUNT
            ):
                raise ValueError(f"{place}/{name} must be an integer from 0 to {MAX_COUNT}, got {count!r}")
        if high is not None and low > high:
            raise ValueError(f"{place}: {least} is {low}, which is more than {most}, {high}")
        return low, high


def _repeat(low: int, high: int | None) -> str:
    if high is None:
        return ("*", "+")[low] if low < 2 else f"{{{low},}}"
    return f"{{{low},{high}}}"


def _is_a(value: Any, type_name: str) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if type_name in ("number", "integer"):
        return is_number and (type_name == "number" or float(value).is_integer())
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[type_name])
