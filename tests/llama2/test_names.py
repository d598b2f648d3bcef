"""A name that a user types is the field's, its second name, or an error that says what was meant."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from llama2.errors import InvalidValue
from llama2.names import SECOND_NAME, by_name, nearest


@by_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    width: int = field(default=1, metadata={SECOND_NAME: "w"})
    height: int = 2


def test_a_second_name_is_the_same_field() -> None:
    assert Sizes(w=5) == Sizes(width=5)  # type: ignore[call-arg]
    assert dataclasses.replace(Sizes(width=5), height=3) == Sizes(width=5, height=3)


def test_an_unknown_name_and_a_field_given_twice_are_refused() -> None:
    with pytest.raises(InvalidValue, match=r"widht is an unknown name: did you mean 'width'\?"):
        Sizes(widht=5)  # type: ignore[call-arg]
    with pytest.raises(InvalidValue, match="width cannot be given twice: w is another name of it"):
        Sizes(width=5, w=6)  # type: ignore[call-arg]


def test_where_nothing_is_near_all_names_are_listed() -> None:
    assert nearest("colour", ["width", "height"]) == "known are height, width"
