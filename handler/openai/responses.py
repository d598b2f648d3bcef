"""Owns responses: their own fields, and what is asked of the engine for one.

`response_input` reads what a response is given, and `response_events` writes it. Knows no other endpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field

from handler.call import Format
from handler.openai.constraints import Calls, Grammars, JsonObjectFormat, TextFormat, format_maker, only_maker
from handler.openai.fields import Body, Name, only, parse
from handler.openai.functions import FunctionChoice, FunctionTools, choose, typed_functions
from handler.openai.generation import CommonFields, Model
from handler.openai.messages import ReasoningEffort, TemplateKwargs
from handler.openai.response_events import ResponseFormat
from handler.openai.response_input import Input, read_messages
from llama2.engine.sampling_params import MAX_INT, MAX_LOGPROBS
from llama2.engine.sequence import Grammar

_STORED = "nothing is stored here: send the whole conversation as input"
_LOGPROBS = "message.output_text.logprobs"
# What a response says of the body that it answers.
_ECHOED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "parallel_tool_calls", "reasoning"),
    *("safety_identifier", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "user"),
)


class SchemaFormat(Body):
    type: Literal["json_schema"]
    name: Name
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    description: str | None = None
    strict: bool | None = None


class TextConfig(Body):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat | None, Field(discriminator="type")] = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: Annotated[Any, only(False, why="events are not padded")] = None


class ResponseBody(CommonFields):
    """https://platform.openai.com/docs/api-reference/responses/create"""

    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    tools: FunctionTools = Field(default_factory=list)
    tool_choice: FunctionChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = Field(default_factory=TextConfig)
    include: list[str] = Field(default_factory=list)
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    reasoning: Reasoning = Field(default_factory=Reasoning)
    safety_identifier: str | None = None

    # Accepted as OpenAI's servers accept them, and without effect.
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    metadata: dict[str, str] = Field(default_factory=dict)
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: bool = False
    stream_options: ResponseStreamOptions | None = None

    background: Annotated[Any, only(False, why="a response is made while its client waits")] = None
    conversation: Annotated[Any, only(why=_STORED)] = None
    previous_response_id: Annotated[Any, only(why=_STORED)] = None
    prompt: Annotated[Any, only(why="there are no prompt templates here; use instructions and input")] = None
    truncation: Annotated[Any, only("disabled", why="truncate_prompt_tokens cuts a prompt")] = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables that the body sets for the model's template."""
        effort = {} if self.reasoning.effort is None else {"reasoning_effort": self.reasoning.effort}
        return effort | self.chat_template_kwargs

    def grammar_maker(self, grammars: Grammars, calls: Calls) -> Callable[[], Grammar] | None:
        shape = self.text.format
        wanted = calls.grammar_makers(grammars, has_format=isinstance(shape, SchemaFormat))
        if isinstance(shape, SchemaFormat):
            wanted["text.format"] = format_maker(grammars, shape.schema_, calls)
        elif isinstance(shape, JsonObjectFormat):
            wanted["text.format"] = grammars.json_object
        return only_maker(wanted, never_ends=self.never_ends)


def read(model: Model, raw: Any) -> Format:
    """What a body asks for.

    Raises:
        InvalidValue, RequestError: a field is wrong.
    """
    body = parse(ResponseBody, raw)
    tools, calls = choose(typed_functions(body.tools), body.tool_choice, several=body.parallel_tool_calls)
    encoded = model.prompts.chat(
        read_messages(body.instructions, body.input),
        tools,
        place="input",
        template_kwargs=body.template_kwargs,
        is_cut=body.is_cut,
    )
    wants_logprobs = _LOGPROBS in body.include or body.top_logprobs is not None
    generation = model.generation(
        body,
        [encoded],
        n=1,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if wants_logprobs else None,
        user=body.safety_identifier or body.user,
        make_grammar=body.grammar_maker(model.grammars, calls),
    )
    echoed = {name: raw[name] for name in _ECHOED if raw.get(name) is not None}
    return ResponseFormat(generation, echoed, calls, model.token_names if wants_logprobs else None)
