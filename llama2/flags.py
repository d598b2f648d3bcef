"""Owns the checks of a command line that fire makes too late, or not at all: unknown flags, words that are no flags,
values that make no sense.

Fire calls the function first and complains about what is left over afterwards, and takes any value for any flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_Command = TypeVar("_Command", bound=Callable[..., Any])
_T = TypeVar("_T")


def run(function: Callable[..., Any], *, mistakes: tuple[type[Exception], ...] = (ValueError,)) -> None:
    """Run `function` as a command. An exception in `mistakes` becomes one line on stderr and exit code 1."""
    try:
        import fire
    except ImportError:
        raise SystemExit("error: this command needs fire for its flags: pip install fire") from None
    try:
        check_flags(sys.argv[1:], function)
        fire.Fire(function)
    except mistakes as error:
        raise SystemExit(f"error: {error}") from None


def describe_options(config: type) -> Callable[[_Command], _Command]:
    """Decorates a command: its flags that are fields of the dataclass `config`, and that its docstring leaves out, get
    the help that the fields have. "Args" must be the docstring's last part."""

    def describe(command: _Command) -> _Command:
        flags, text = inspect.signature(command).parameters, inspect.getdoc(command) or ""
        own = [
            field for field in dataclasses.fields(config) if field.name in flags and f"    {field.name}:" not in text
        ]
        command.__doc__ = "\n".join([text, *(f"    {field.name}: {field.metadata['help']}." for field in own)])
        return command

    return describe


def check_flags(arguments: Sequence[str], function: Callable[..., Any]) -> None:
    """Refuse what is neither `--flag value`, `--flag=value` nor a bare `--switch` of the function's parameters.

    Raises:
        ValueError: it names the word, and the flag that may have been meant.
    """
    known = [*inspect.signature(function).parameters, "help"]
    former = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument[2:].split("=")[0].replace("-", "_")
            if flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                raise ValueError(f"unknown option --{flag}" + (f": did you mean --{near[0]}?" if near else ""))
        elif not former.startswith("--") or "=" in former:
            raise ValueError(f"unexpected argument {argument!r}: every option is a --flag")
        former = argument


def as_texts(arguments: Sequence[str]) -> list[str]:
    """For fire, what `check_flags` found in order, with quoted values: fire reads no number in 1.10 then.

    Raises:
        ValueError: a flag has no value.
    """
    if "--help" in arguments:
        return ["--help"]
    words: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            words[-1] += f"={argument!r}"
        else:
            words.append(f"{flag}={value!r}" if equals else flag)
    for word in words:
        if "=" not in word:
            raise ValueError(f"{word} needs a value")
    return words


def argument(read: Callable[[str], _T]) -> Callable[[str], _T]:
    """The type of an argument of argparse that `read` reads: argparse shows the message of this error alone."""

    def checked(text: str) -> _T:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def several(value: Any) -> list[Any]:
    """The value of a flag that takes one or more, as a list: fire makes a tuple of "1,8", and a number of "1"."""
    if isinstance(value, str):
        return [part for part in value.split(",") if part]
    return list(value) if isinstance(value, Sequence) else [value]


def given(**flags: Any) -> dict[str, Any]:
    """The flags that have a value: neither None nor an empty list."""
    return {name: value for name, value in flags.items() if value not in (None, [])}


def check_counts(*, least: int = 1, **flags: object) -> None:
    """Refuse a flag that is not a whole number of `least` or more. Of a list, every item is checked.

    Raises:
        ValueError: it names the flag, what it takes, and the value.
    """
    _check(flags, lambda value: type(value) is int and value >= least, f"a whole number of {least} or more")


def check_amounts(**flags: object) -> None:
    """Refuse a flag that is not a number above 0; otherwise as `check_counts`."""
    _check(flags, lambda value: type(value) in (int, float) and 0 < value < math.inf, "a number above 0")


def _check(flags: Mapping[str, object], is_valid: Callable[[Any], bool], kind: str) -> None:
    for name, value in flags.items():
        for one in (value or [""]) if isinstance(value, list) else [value]:
            if not is_valid(one):
                raise ValueError(f"--{name} must be {kind}, got {one!r}")
