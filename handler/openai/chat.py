"""Owns chat completions: their own fields, and how a reply is asked of the engine and written.

That is a message with its tool calls, or its deltas. Knows no other endpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from handler.call import Format, Progress
from handler.openai.constraints import Calls
from handler.openai.fields import only, parse
from handler.openai.functions import ToolChoice, Tools, choose, typed_tools
from handler.openai.generation import ChoicesBody, Generation, Model
from handler.openai.inspector import Inspector, inspected
from handler.openai.logprobs import chat_logprobs
from handler.openai.messages import AUDIO, FUNCTIONS, Messages, ReasoningEffort, TemplateKwargs
from handler.openai.replies import ChoicesFormat
from llama2.engine.sampling_params import MAX_INT, MAX_LOGPROBS
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.errors import InvalidValue
from llama2.text.tools import CallDelta, ToolStream


class ChatBody(ChoicesBody):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Tools = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    reasoning_effort: ReasoningEffort | None = None
    safety_identifier: str | None = None

    # Accepted as OpenAI's servers accept them, and without effect.
    metadata: dict[str, str] = Field(default_factory=dict)
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: bool = False
    verbosity: Literal["low", "medium", "high"] | None = None

    audio: Annotated[Any, only(why=AUDIO)] = None
    function_call: Annotated[Any, only(why=FUNCTIONS)] = None
    functions: Annotated[Any, only(why=FUNCTIONS)] = None
    modalities: Annotated[Any, only(["text"], why=AUDIO)] = None
    web_search_options: Annotated[Any, only(why="this server does not search the web")] = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The variables that the body sets for the model's template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | self.chat_template_kwargs


def read(model: Model, raw: Any) -> Format:
    """What a body asks for.

    Raises:
        InvalidValue, RequestError: a field is wrong.
    """
    body = parse(ChatBody, raw)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidValue("top_logprobs", "needs logprobs to be true")
    tools, calls = choose(typed_tools(body.tools), body.tool_choice, several=body.parallel_tool_calls)
    messages = [message.typed() for message in body.messages]
    encoded = model.prompts.chat(
        messages,
        tools,
        template_kwargs=body.template_kwargs,
        special_tags="encode" if body.dry_run else None,
        is_cut=body.is_cut,
    )
    generation = model.generation(
        body,
        [encoded],
        n=body.n,
        max_tokens=_max_tokens(body),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        user=body.safety_identifier or body.user,
        make_grammar=body.grammar_maker(model.grammars, calls=calls, never_ends=body.never_ends),
        stream_options=body.options(),
    )
    if body.dry_run:
        report = Inspector(model).dialog(generation.prompts[0], encoded, messages, tools, body.template_kwargs)
        return inspected(generation.model, [report])
    return ChatFormat(model, generation, body, calls)


def _max_tokens(body: ChatBody) -> int | None:
    if body.max_tokens == 0:
        raise InvalidValue("max_tokens", "must be at least 1, got 0")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidValue("max_tokens", f"contradicts max_completion_tokens={body.max_completion_tokens}")
    return body.max_tokens or body.max_completion_tokens


class ChatFormat(ChoicesFormat):
    """The replies to one dialog."""

    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: Model, generation: Generation, body: ChatBody, calls: Calls) -> None:
        super().__init__(generation)
        self._token_names = model.token_names
        self._body = body
        self._calls = calls
        self._streams: dict[int, ToolStream] = {}  # of the choices whose stream has begun

    def request(self, **common: Any) -> Request:
        return Request(**common, continues_prompt=False)

    def news(self, index: int, news: Output | Progress) -> Iterator[dict[str, Any]]:
        """Role, content or calls as they come, and at the end the reason."""
        if index not in self._streams:
            self._streams[index] = self._calls.stream()
            yield _delta({"role": "assistant", "content": ""})
        stream = self._streams[index]
        pieces = [stream.push(news.text)]
        if news.finish_reason is not None:
            pieces.append(stream.finish())
        logprobs = self._logprobs(news.logprobs) if news.logprobs else None
        content = "".join(piece.content for piece in pieces)
        if content or logprobs:
            yield _delta({"content": content}, logprobs=logprobs)
        calls = [_call_delta(call) for piece in pieces for call in piece.calls if self._shows(call.index)]
        if calls:
            yield _delta({"tool_calls": calls})
        if news.finish_reason is not None:
            is_call = stream.calls > 0 and news.finish_reason == "stop"
            yield _delta({}, finish_reason="tool_calls" if is_call else news.finish_reason)

    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        return [self._choice(index, reply) for index, reply in enumerate(progress)]

    def _choice(self, index: int, reply: Progress) -> dict[str, Any]:
        """What the deltas of the whole reply add up to."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        calls: list[dict[str, Any]] = []
        for choice in self.news(index, reply):
            message["content"] += choice["delta"].get("content", "")
            for call in choice["delta"].get("tool_calls", ()):
                if "id" in call:
                    calls.append({name: value for name, value in call.items() if name != "index"})
                else:
                    calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        if calls:
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return {
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": choice["finish_reason"],
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(self._token_names, entries) if self._body.logprobs else None

    def _shows(self, call_index: int) -> bool:
        return self._body.parallel_tool_calls or call_index == 0


def _delta(
    delta: dict[str, Any], *, logprobs: dict[str, Any] | None = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
