"""Owns sets of characters, as ranges of code points, and how a grammar writes them.

Surrogates are no characters: UTF-8 has no bytes for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)


@dataclass(frozen=True, slots=True)
class CharSet:
    """Ranges of code points, both ends included, in order, with a gap between any two."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> CharSet:
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            elif low <= high:
                merged.append((low, high))
        return cls(tuple(merged))

    @classmethod
    def chars(cls, text: str) -> CharSet:
        return cls.of((ord(character), ord(character)) for character in text)

    def __or__(self, other: CharSet) -> CharSet:
        return CharSet.of((*self.ranges, *other.ranges))

    def __and__(self, other: CharSet) -> CharSet:
        return ~(~self | ~other)

    def __sub__(self, other: CharSet) -> CharSet:
        return self & ~other

    def __invert__(self) -> CharSet:
        """All other characters."""
        starts = [0, *(high + 1 for _, high in self.ranges)]
        ends = [*(low - 1 for low, _ in self.ranges), _LAST]
        gaps = []
        for low, high in zip(starts, ends, strict=True):
            gaps += [(low, min(high, _SURROGATES[0] - 1)), (max(low, _SURROGATES[1] + 1), high)]
        return CharSet.of(gap for gap in gaps if gap[0] <= gap[1])

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __contains__(self, character: str) -> bool:
        return any(low <= ord(character) <= high for low, high in self.ranges)

    def as_ebnf(self) -> str:
        """A character class; the set must not be empty."""
        return (
            "[" + "".join(_escape(low) + (f"-{_escape(high)}" if low < high else "") for low, high in self.ranges) + "]"
        )


def as_ebnf(text: str) -> str:
    """A grammar's string of just this text."""
    return '"' + "".join(_escape(ord(character)) for character in text) + '"'


def _escape(code: int) -> str:
    character = chr(code)
    if character.isascii() and character.isalnum():
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


ALL = ~CharSet()
DIGITS = CharSet.of([(0x30, 0x39)])
