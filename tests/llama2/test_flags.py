"""What a command is told: a value that makes no sense is named with its flag and what it takes."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import offline, online, prefix
from llama2.config import EngineConfig
from llama2.flags import check_amounts, check_counts, given, run, several


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "many", "", [0, 1], [], [1, "x"], (1, 2), float("nan")])
def test_a_count_is_a_whole_number_or_a_list_of_them(value: Any) -> None:
    check_counts(rounds=1, batches=[1, 8])
    with pytest.raises(ValueError, match=r"^--rounds must be a whole number of 1 or more, got "):
        check_counts(batches=1, rounds=value)


def test_a_count_that_may_be_nothing_may_not_be_less() -> None:
    check_counts(least=0, waiting=[0, 10_000])
    with pytest.raises(ValueError, match=r"^--waiting must be a whole number of 0 or more, got -1$"):
        check_counts(least=0, waiting=[0, -1])


@pytest.mark.parametrize("value", [0, -1, 0.0, "2", True, None, [1.5, 0], float("inf"), float("nan")])
def test_an_amount_is_a_number_above_0(value: Any) -> None:
    check_amounts(gigabytes=1, rates=[0.5, 2])
    with pytest.raises(ValueError, match=r"^--gigabytes must be a number above 0, got "):
        check_amounts(gigabytes=value)


def test_what_was_left_out_is_not_checked() -> None:
    assert given(tp=None, rates=[], threads=0) == {"threads": 0}


@pytest.mark.parametrize(("value", "values"), [(1, [1]), ((1, 8), [1, 8]), ("a,b", ["a", "b"]), ("", []), (2.5, [2.5])])
def test_one_value_and_several_are_read_alike(value: Any, values: list[Any]) -> None:
    assert several(value) == values


def test_a_command_without_fire_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fire", None)
    with pytest.raises(SystemExit, match=r"^error: this command needs fire for its flags: pip install fire$"):
        run(lambda: pytest.fail("ran"))


@pytest.mark.parametrize("command", [offline.benchmark, online.benchmark, prefix.benchmark])
def test_an_option_of_the_engine_has_the_engines_help_and_default(command: Callable[..., None]) -> None:
    described = dict(line.strip().split(": ", 1) for line in (command.__doc__ or "").splitlines() if ": " in line)
    parameters = inspect.signature(command).parameters
    assert parameters.keys() <= described.keys()
    shared = [field for field in dataclasses.fields(EngineConfig) if f"{field.metadata['help']}." in described.values()]
    assert shared
    for field in shared:
        assert described[field.name] == f"{field.metadata['help']}."
        assert parameters[field.name].default == field.default
