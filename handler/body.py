"""Owns the way from the bytes of a request's body to a JSON value.

Knows no API, and so not which fields a body may have.
"""

from __future__ import annotations

import json
from typing import Any

from handler.errors import RequestError

# Values in a body, counted by its punctuation. Parsing so many takes some 30 ms, in which no other thread runs.
MAX_VALUES = 200_000


def read_body(body: Any, *, is_json: bool) -> dict[str, Any] | str:
    """The body of one request: a JSON object, or a plain text.

    `body` is None if there is none, bytes or text as they were sent, or what a front has parsed already. `is_json`: it
    was sent as application/json. `curl -T` names no type, so bytes that start like JSON are read as JSON. Of a plain
    text one line break at the end is dropped: it is the editor's, not the prompt's.

    Raises:
        RequestError: there is no body, or it is not UTF-8, not JSON, JSON but no object, or too many values.
    """
    if body is None:
        raise RequestError(
            "the request has no body, or one that was sent as a form, as curl -d does: add the header "
            "'Content-Type: application/json', or send a file with curl -T FILE"
        )
    if isinstance(body, (bytes, bytearray)):
        body = _decode(bytes(body))
    if isinstance(body, str):
        text = body.removeprefix("\ufeff")
        if not is_json and not text.lstrip().startswith(("{", "[")):
            return text.removesuffix("\n").removesuffix("\r")
        body = _parse(text)
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {type(body).__name__}")
    return body


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None


def _parse(text: str) -> Any:
    if (values := sum(map(text.count, ",[{"))) > MAX_VALUES:
        raise RequestError(f"the body may have {MAX_VALUES} commas and brackets at most, got {values}", status=413)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} (a plain text that "
            'starts with { or [ must be sent as {"prompt": ...})'
        ) from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of nested brackets
        raise RequestError("the body is not valid JSON: a number is too long or the nesting too deep") from None
