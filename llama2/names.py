"""Owns names that a user types: what an unknown one was probably meant to be, and second names of fields.

Knows no field's meaning.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from llama2.errors import InvalidValue

T = TypeVar("T")

# In a field's metadata: what else it may be called.
SECOND_NAME = "second_name"


# Names as close as min_tokens and max_tokens, 0.8, are names of two things in a body, which may have other servers'
# fields.
OF_A_BODY = 0.82


def nearest(name: str, known: Collection[str], *, likeness: float = 0.6) -> str:
    """The end of an error message about an unknown name: the known one that it is misspelt for, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=likeness)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"


def first_names(given: Mapping[str, Any], config: type, *others: str) -> dict[str, Any]:
    """`given` by the names of the fields of the dataclass `config`, or by `others`.

    Raises:
        InvalidValue: a name is unknown, or a field was given by both of its names.
    """
    fields = {field.name: field.metadata.get(SECOND_NAME) for field in dataclasses.fields(config)}
    first = {second: name for name, second in fields.items() if second}
    first |= {name: name for name in (*fields, *others)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in first:
            raise InvalidValue(name, f"is an unknown name: {nearest(name, first)}")
        if first[name] in values:
            raise InvalidValue(first[name], f"cannot be given twice: {fields[first[name]]} is another name of it")
        values[first[name]] = value
    return values


def by_name(config: type[T]) -> type[T]:
    """Decorates a dataclass with keywords alone: its constructor takes second names, too, and says what an unknown name
    was probably meant to be.

    Raises:
        InvalidValue: from the constructor, as `first_names`.
    """
    init: Any = config.__init__

    @functools.wraps(init)
    def named(self: T, **given: Any) -> None:
        init(self, **first_names(given, config))

    config.__init__ = named  # type: ignore[assignment, method-assign]
    return config
