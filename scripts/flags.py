"""Owns what fire finds out too late: a command line with a flag that does not exist, or a word that is no flag.

Fire calls the function first and complains about what is left over afterwards.
"""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import fire


def run(function: Callable[..., Any], *, mistakes: tuple[type[Exception], ...] = (ValueError,)) -> None:
    """Be the command that `function` is. What it raises of `mistakes` is one line, and exit code 1."""
    try:
        check_flags(sys.argv[1:], function)
        fire.Fire(function)
    except mistakes as error:
        raise SystemExit(f"error: {error}") from None


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
