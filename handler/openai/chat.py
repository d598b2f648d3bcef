"""Owns how a chat reply is asked of the engine and written: a message with its tool calls, or its deltas.

Knows no messages that led to it and no HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from handler.call import Progress
from handler.openai.logprobs import TokenNames, chat_logprobs
from handler.openai.responses import Generation, GenerationFormat
from handler.openai.schema import ChatBody
from llama2.engine.sequence import FinishReason, Output, Request, TokenLogprobs
from llama2.text.tokenizer import Tokenizer
from llama2.text.tools import CallDelta, ToolPrompt, ToolStream


class ChatFormat(GenerationFormat):
    """The replies to one dialog."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, generation: Generation, body: ChatBody, tools: ToolPrompt, tokenizer: Tokenizer) -> None:
        super().__init__(generation)
        self._body = body
        self._tools = tools
        self._names = TokenNames(tokenizer)
        self._streams: dict[int, ToolStream] = {}  # of the choices whose stream has begun
        self._max_calls = 1 if body.parallel_tool_calls is False else None

    def request(self, **common: Any) -> Request:
        return Request(**common, continues_prompt=False)

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        return "".join(
            self.event(index, {"delta": delta, "logprobs": logprobs, "finish_reason": reason}, progress)
            for delta, logprobs, reason in self._deltas(index, output)
        )

    def _deltas(self, index: int, output: Output) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None, str | None]]:
        """Role, content or calls as they come, and at the end the reason."""
        if index not in self._streams:
            self._streams[index] = self._tools.stream()
            yield {"role": "assistant", "content": ""}, None, None
        stream = self._streams[index]
        news = [stream.push(output.text)]
        if output.finish_reason is not None:
            news.append(stream.finish())
        logprobs = self._logprobs(output.logprobs) if output.logprobs else None
        content = "".join(one.content for one in news)
        if content or logprobs:
            yield {"content": content}, logprobs, None
        calls = [_call_delta(call) for one in news for call in one.calls if self._shows(call.index)]
        if calls:
            yield {"tool_calls": calls}, None, None
        if output.finish_reason is not None:
            yield {}, None, _reason(stream, output.finish_reason)

    def choices(self, progress: Sequence[Progress]) -> list[dict[str, Any]]:
        return [self._choice(index, reply) for index, reply in enumerate(progress)]

    def _choice(self, index: int, reply: Progress) -> dict[str, Any]:
        stream = self._tools.stream()
        stream.push(reply.text)
        stream.finish()
        message: dict[str, Any] = {"role": "assistant", "content": stream.content, "refusal": None}
        if stream.calls:
            message["content"] = stream.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in stream.calls[: self._max_calls]
            ]
        assert reply.finish_reason is not None
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(reply.logprobs),
            "finish_reason": _reason(stream, reply.finish_reason),
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        return chat_logprobs(self._names, entries) if self._body.logprobs else None

    def _shows(self, call_index: int) -> bool:
        return self._max_calls is None or call_index < self._max_calls


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.id is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}


def _reason(stream: ToolStream, reason: FinishReason) -> str:
    return "tool_calls" if stream.calls and reason == "stop" else reason
