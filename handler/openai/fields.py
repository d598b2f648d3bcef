"""Owns how the fields of a body are declared and checked, and how a wrong one is named in OpenAI's words.

Knows no field: each is declared beside what uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from handler.errors import RequestError, unknown_field
from llama2.engine.sampling_params import MAX_INT
from llama2.errors import shown

# What each of pydantic's kinds of error, and of ours, is called by OpenAI.
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "missing": "missing_required_parameter",
    "unsupported": "unsupported_parameter",
}
_WORDS = {
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "json_invalid": "must be a JSON object in a string",
    "json_type": "must be a JSON object in a string",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "union_tag_invalid": "must have a {discriminator} of {expected_tags}",
    "union_tag_not_found": "must have a {discriminator}",
    "string_pattern_mismatch": "must match {pattern}",
}
_KINDS = {str: "text", int: "id", list: "list", dict: "object"}

TokenId = Annotated[int, Field(ge=0, le=MAX_INT)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Body(BaseModel):
    """What all bodies have in common: no field is unknown, no value is bent into another type, null is the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, body: Any) -> Any:
        required = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name in required}


def only(*allowed: Any, why: str) -> AfterValidator:
    """For a field that is refused unless it says what holds anyway."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise PydanticCustomError("unsupported", "is not supported: {why}", {"why": why})
        return value

    return AfterValidator(check)


def by_kind(wanted: str) -> Discriminator:
    """For a field of several types: chosen by what the value is, a list by its first item ("texts", "ids", "lists")."""

    def kind(value: Any) -> str | None:
        if isinstance(value, list):
            return f"{_KINDS.get(type(value[0]))}s" if value else "texts"
        return _KINDS.get(type(value))

    return Discriminator(kind, "one_of", f"must be {wanted}")


B = TypeVar("B", bound=Body)


def parse(kind: type[B], body: Any) -> B:
    """Check a body.

    Raises:
        RequestError: a field is unknown, missing, of a wrong type or out of range; `param` is the path to it.
    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object, sent with 'Content-Type: application/json'")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error.errors(include_url=False)[0], kind, body) from None


def _refusal(error: ErrorDetails, kind: type[Body], body: Mapping[str, Any]) -> RequestError:
    """In OpenAI's words: what is wrong with which field."""
    path = _path(error["loc"], body, is_missing=error["type"] == "missing")
    code = _CODES.get(error["type"], "invalid_value")
    if code == "unknown_parameter":
        known = {field.alias or name for name, field in kind.model_fields.items()}
        message = str(unknown_field(path, known)) if path in body else f"{path} is an unknown field"
    elif code == "missing_required_parameter":
        message = f"{path} is missing"
    elif code == "unsupported_parameter":
        message = f"{path} {error['msg']}"
    else:
        wanted = _WORDS.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))
        message = f"{path} {wanted}, got {shown(error['input'])}"
    return RequestError(message, param=path, code=code)


def _path(loc: tuple[int | str, ...], body: Any, *, is_missing: bool) -> str:
    """As OpenAI writes it, `messages[0].content`. The names of union members, which pydantic mixes in, are left out."""
    path, value = "", body
    for position, part in enumerate(loc):
        if isinstance(value, list) and isinstance(part, int):
            path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (is_missing and position == len(loc) - 1)):
            path, value = f"{path}.{part}" if path else str(part), value.get(part)
    return path
