"""Owns how a grammar writes JSON numbers between bounds, with so many digits that every reader has them exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

# A double holds any 15 digits.
_DIGITS = 15
_DECIMALS = 6
_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")

_INTEGER = '"-"? ("0" | [1-9] [0-9]{0,14})'
_NUMBER = f'{_INTEGER} ("." [0-9]{{1,15}})? ([eE] [+\\-]? [0-9]{{1,2}})?'

# A number of so many digits, each from one to another.
_Pattern = list[tuple[int, int]]


def integer_rule(schema: Mapping[str, Any], place: str) -> str:
    """The grammar of the integers that `schema`'s bounds allow."""
    if schema.get("multipleOf", 1) != 1:
        raise ValueError(f"{place}: the schema keyword 'multipleOf' is not supported")
    if not any(bound in schema for bound in _BOUNDS):
        return f"({_INTEGER})"
    options = list(_between(schema, 0, place))
    if not options:
        raise ValueError(f"{place}: no integer is within minimum and maximum")
    return f"({' | '.join(options)})"


def number_rule(schema: Mapping[str, Any], place: str) -> str:
    """The grammar of numbers; between bounds they are written without an exponent."""
    if "multipleOf" in schema:
        raise ValueError(f"{place}: the schema keyword 'multipleOf' is not supported")
    if not any(bound in schema for bound in _BOUNDS):
        return f"({_NUMBER})"
    options = [option for decimals in range(_DECIMALS + 1) for option in _between(schema, decimals, place)]
    if not options:
        raise ValueError(f"{place}: no number of at most {_DECIMALS} decimals is within minimum and maximum")
    return f"({' | '.join(options)})"


def _between(schema: Mapping[str, Any], decimals: int, place: str) -> Iterator[str]:
    """The numbers with so many decimals, as integers in units of the last one."""
    limit = 10**_DIGITS - 1
    low, high = -limit, limit
    for name in _BOUNDS:
        if name not in schema:
            continue
        bound = _bound(schema[name], f"{place}/{name}") * 10**decimals
        if name == "minimum":
            low = max(low, math.ceil(bound))
        elif name == "exclusiveMinimum":
            low = max(low, math.floor(bound) + 1)
        elif name == "maximum":
            high = min(high, math.floor(bound))
        else:
            high = min(high, math.ceil(bound) - 1)
    if low < 0 and low <= high:
        yield from (f'"-" {_as_ebnf(digits, decimals)}' for digits in _digits(max(-high, 1), -low, decimals + 1))
    if high >= 0 and low <= high:
        yield from (_as_ebnf(digits, decimals) for digits in _digits(max(low, 0), high, decimals + 1))


def _bound(value: Any, place: str) -> Fraction:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 10**_DIGITS:
        raise ValueError(f"{place} must be a number within ±1e{_DIGITS}, got {value!r}")
    return Fraction(repr(value))  # as it is written, not as it is held


def _digits(low: int, high: int, width: int) -> Iterator[_Pattern]:
    """Patterns of all numbers from `low` to `high`, padded with zeros to at least `width` digits."""
    for length in range(width, max(len(str(high)), width) + 1):
        least, most = (0 if length == width else 10 ** (length - 1)), 10**length - 1
        if max(low, least) <= min(high, most):
            yield from _same_length(str(max(low, least)).zfill(length), str(min(high, most)).zfill(length))


def _same_length(low: str, high: str) -> Iterator[_Pattern]:
    if set(low) <= {"0"} and set(high) <= {"9"}:
        yield [(0, 9)] * len(low)
        return
    first, last, rest = int(low[0]), int(high[0]), len(low) - 1
    if first == last:
        yield from ([(first, first), *tail] for tail in _same_length(low[1:], high[1:]))
        return
    # The first and the last leading digit have a rest that is cut off, unless it is whole.
    if low[1:].strip("0"):
        yield from ([(first, first), *tail] for tail in _same_length(low[1:], "9" * rest))
        first += 1
    cut = high[1:].strip("9") != ""
    if first <= last - cut:
        yield [(first, last - cut), *[(0, 9)] * rest]
    if cut:
        yield from ([(last, last), *tail] for tail in _same_length("0" * rest, high[1:]))


def _as_ebnf(digits: _Pattern, decimals: int) -> str:
    parts = [f"[{low}-{high}]" if low < high else f'"{low}"' for low, high in digits]
    if decimals:
        parts.insert(len(parts) - decimals, '"."')
    return " ".join(parts)
