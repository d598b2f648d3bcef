"""Owns the errors that cross floors: a value that a user got wrong, with its field, and an engine that has failed.

Knows no field's meaning: what is allowed is said where it is checked.
"""

from __future__ import annotations

MAX_SHOWN = 80  # characters of a value in a message


class InvalidValue(ValueError):
    """A field is missing, unknown, or holds what it may not.

    `field` is the path to it, such as `top_p` or `tools[1].function.name`; `problem` goes on from there and says what
    is allowed and what was given. The message is both: "top_p must be at most 1, got 2".
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field} {self.problem}"


class EngineFailure(RuntimeError):
    """An engine has ended, and every request to it with it; the message says why, for a log."""


def shown(value: object) -> str:
    """A value as a message shows it: as Python writes it, and only the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
