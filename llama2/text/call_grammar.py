"""Owns the grammar of a reply that may call tools: free text, or calls that follow the schemas of their arguments.

What `tools.ToolStream` reads as calls begins in a way that no free text may begin, so a model that begins a call has to
go on with one. Writes llguidance's Lark; knows no vocabulary, and which schemas llguidance follows is `json_schema`'s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from llama2.text.tool_prompt import CALL_TAG, END_CALL_TAG

_SPACE = r"[ \t\r\n]{0,32}"
_SOME_SPACE = r"[ \t\r\n]{1,32}"
_FUNCTION = f'"type"{_SPACE}:{_SPACE}"function"'
_LIST, _END_LIST, _END = r"\[", r"\]", r"\}"


def call_start(names: Collection[str]) -> str:
    """The regular expression of how calls begin, for Rust and Python alike."""
    named = _spaced('"name"', ":", f'"({"|".join(map(re.escape, names))})"')
    marks = (_spaced(r"(\[", r")?\{", mark) for mark in (named, _FUNCTION, '"(arguments|parameters)"'))
    return f"{_SPACE}({'|'.join([CALL_TAG, *marks])})"


def call_grammar(schemas: Mapping[str, Mapping[str, Any]], *, several: bool) -> str:
    """The rules, whose start is `start`.

    `schemas` are those of the arguments by the names of the tools, as llguidance takes them. `several`: more than one
    call may be made.
    """
    rules = [
        f"FREE: /(?s:.*)/ & ~{_terminal(call_start(schemas) + '(?s:.*)')}",
        f"TAG: {_terminal(_spaced('', CALL_TAG))}",
        f"END_TAG: {_terminal(_spaced('', END_CALL_TAG))}",
        f"END_LIST: {_terminal(_spaced('', _END_LIST))}",
        f"END: {_terminal(_spaced('', _END))}",
        f"SPACE: {_terminal(_SOME_SPACE)}",
    ]
    for index, (name, schema) in enumerate(schemas.items()):
        kind = f"({_spaced(_FUNCTION, ',', '')})?"
        opening = _spaced(r"\{", f'{kind}"name"', ":", f'"{re.escape(name)}"', ",", '"(arguments|parameters)"', ":", "")
        rules += [
            f"ONE_{index}: {_terminal(_spaced('', opening))}",
            # A list's beginning is one terminal with that of its first call: alone it could be that of a text.
            f"FIRST_{index}: {_terminal(_spaced('', _LIST, opening))}",
            f"NEXT_{index}: {_terminal(_spaced('', ',', opening))}",
            f"arguments_{index}: %json {json.dumps(schema)}",
        ]
    numbers = range(len(schemas))
    one, first, following = (
        "(" + " | ".join(f"{opening}_{index} arguments_{index}" for index in numbers) + ") END"
        for opening in ("ONE", "FIRST", "NEXT")
    )
    more_tagged, more_listed = (f"(END_TAG TAG {one})*", f"({following})*") if several else ("", "")
    start = (
        "FREE",
        f"{one} SPACE?",
        f"TAG {one} {more_tagged} END_TAG? SPACE?",
        f"{first} {more_listed} END_LIST SPACE?",
    )
    return "\n".join([f"start: {' | '.join(start)}", *rules])


def _spaced(*parts: str) -> str:
    """A regular expression: the parts with white space between them."""
    return _SPACE.join(parts)


def _terminal(regex: str) -> str:
    return "/" + regex.replace("/", r"\/") + "/"
