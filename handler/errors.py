"""Owns the refusal of one request, and its JSON form.

Knows no API and no field: who refuses says which one is to blame.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from llama2.errors import InvalidValue
from llama2.names import OF_A_BODY, nearest

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class RequestError(ValueError):
    """One request is refused, with an HTTP status and the field that is to blame. Nobody else notices.

    `code` is a word for programs, where there is one; else the status stands for it.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    @classmethod
    def of(cls, error: InvalidValue, *, code: str | None = None) -> RequestError:
        """A refusal for what a check below the server has found."""
        return cls(str(error), param=error.field, code=code)

    def as_json(self) -> str:
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code or self.status}
        text = json.dumps({"error": error}, ensure_ascii=False) + "\n"
        return text.encode(errors="replace").decode()  # a field's name can hold what UTF-8 cannot say


def unknown_field(name: str, known: Collection[str]) -> InvalidValue:
    """The refusal of a field of a body that has the fields `known`."""
    return InvalidValue(name, f"is an unknown field: {nearest(name, known, likeness=OF_A_BODY)}")
