"""Owns the shape of OpenAI's request bodies: which fields there are, of which type, and in which range.

https://platform.openai.com/docs/api-reference, completions and chat; beyond it the extras that vLLM's server has. A
documented field that means nothing here is accepted at its default alone. Knows no tokenizer and no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from handler.config import nearest
from handler.errors import RequestError
from llama2.engine.sequence import MAX_LOGPROBS

MAX_N = 128
MAX_STOPS = 64  # each is looked for at every character

# What each of pydantic's kinds of error is called by OpenAI.
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
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "union_tag_invalid": "must have a {discriminator} of {expected_tags}",
    "union_tag_not_found": "must have a {discriminator}",
    "string_pattern_mismatch": "must match {pattern}",
}


def only(*allowed: Any, why: str) -> AfterValidator:
    """For a field that is refused unless it says what holds anyway."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in (None, *allowed)):
            raise PydanticCustomError("unsupported", "is not supported: {why}", {"why": why})
        return value

    return AfterValidator(check)


_KINDS = {str: "text", int: "id", list: "list", dict: "object"}


def by_kind(wanted: str) -> Discriminator:
    """For a field of several types: chosen by what the value is, a list by its first item ("texts", "ids", "lists")."""

    def kind(value: Any) -> str | None:
        if isinstance(value, list):
            return f"{_KINDS.get(type(value[0]))}s" if value else "texts"
        return _KINDS.get(type(value))

    return Discriminator(kind, "one_of", f"must be {wanted}")


Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[int, Field(ge=0)]
_FUNCTIONS = "it is deprecated; use tools and tool_choice"
_AUDIO = "this model reads and writes text"
_STORE = "nothing is stored here"
_REASONING = "this model does not reason before it answers"


class Body(BaseModel):
    """What all bodies have in common: no field is unknown, no value is bent into another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, only(False, why="chunks are not padded")] = None


class JsonSchema(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class JsonObjectFormat(Body):
    type: Literal["json_object"]


class JsonSchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat,
    Field(discriminator="type"),
]
Stops = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[str], Field(max_length=MAX_STOPS), Tag("texts")],
    by_kind("a string or a list of strings"),
]
Prompts = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[list[TokenId], Tag("ids")]
    | Annotated[list[list[TokenId]], Tag("lists")],
    by_kind("a string, a list of strings, a list of token ids or a list of such lists"),
]


class GenerationBody(Body):
    """The fields that both endpoints have, vLLM's extras last."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stop: Stops | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    response_format: ResponseFormat | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    skip_special_tokens: Annotated[Any, only(True, why="special tokens are never part of a reply's text")] = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    dry_run: bool | None = None


class CompletionBody(GenerationBody):
    prompt: Prompts
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Annotated[Any, only(why="this model was not trained to fill a gap")] = None


class TextPart(Body):
    type: Annotated[Any, only("text", why=_AUDIO)]
    text: str


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextPart], Tag("objects")], by_kind("a string or a list of text parts")
]


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class SystemMessage(Body):
    role: Literal["system", "developer", "user"]
    content: Content
    name: Annotated[Any, only(why="this model's prompt format has no place for names")] = None


class AssistantMessage(Body):
    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: list[ToolCall] | None = None
    name: Annotated[Any, only(why="this model's prompt format has no place for names")] = None
    refusal: Annotated[Any, only(why="this model's prompt format has no place for refusals")] = None
    audio: Annotated[Any, only(why=_AUDIO)] = None
    function_call: Annotated[Any, only(why=_FUNCTIONS)] = None
    annotations: Annotated[Any, only([], why="this model's prompt format has no place for annotations")] = None


class ToolMessage(Body):
    role: Literal["tool"]
    content: Content
    tool_call_id: str


Message = Annotated[
    SystemMessage | AssistantMessage | ToolMessage,
    Field(discriminator="role"),
]
Messages = Annotated[list[Message], Field(min_length=1)]


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"]
    function: FunctionName


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("text")] | Annotated[ToolChoice, Tag("object")],
    by_kind("'none', 'auto', 'required' or a function's name"),
]


class ChatBody(GenerationBody):
    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None

    audio: Annotated[Any, only(why=_AUDIO)] = None
    function_call: Annotated[Any, only(why=_FUNCTIONS)] = None
    functions: Annotated[Any, only(why=_FUNCTIONS)] = None
    metadata: Annotated[Any, only({}, why=_STORE)] = None
    modalities: Annotated[Any, only(["text"], why=_AUDIO)] = None
    prediction: Annotated[Any, only(why="replies are not sped up by predictions")] = None
    prompt_cache_key: str | None = None  # there is one cache, so requests of the same key meet in it
    prompt_cache_retention: Annotated[Any, only("in_memory", why="prompts are cached in memory alone")] = None
    reasoning_effort: Annotated[Any, only("none", why=_REASONING)] = None
    service_tier: Annotated[Any, only("auto", "default", why="there is one tier")] = None
    store: Annotated[Any, only(False, why=_STORE)] = None
    verbosity: Annotated[Any, only("medium", why="this model does not know how to be terser or wordier")] = None
    web_search_options: Annotated[Any, only(why="this server does not search the web")] = None


class TokenizeBody(Body):
    """vLLM's: a prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: Annotated[Any, only(True, why="a prompt ends where the assistant begins")] = None
    continue_final_message: Annotated[Any, only(False, why="a prompt ends where the assistant begins")] = None
    chat_template: Annotated[Any, only(why="the model's own template is used")] = None
    chat_template_kwargs: Annotated[Any, only({}, why="the model's own template is used as it is")] = None


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]


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
        message = f"unknown field {path!r}: {nearest(path, known) if path in body else 'it has no place there'}"
    elif code == "missing_required_parameter":
        message = f"{path} is missing"
    elif code == "unsupported_parameter":
        message = f"{path} {error['msg']}"
    else:
        wanted = _WORDS.get(error["type"], error["msg"]).format_map(error.get("ctx", {}))
        message = f"{path} {wanted}, got {_short(error['input'])}"
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
