"""Owns how a response is written: its events as they come, and the whole of it, which is what the last event has.

Knows no field of a body: it is given those that come back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from handler.call import Progress
from handler.errors import RequestError
from handler.openai.constraints import Calls
from handler.openai.generation import Generation
from handler.openai.logprobs import TokenNames, response_logprobs
from handler.openai.replies import GenerationFormat, to_json
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.text.tools import CallDelta

# What holds of every response here, unless a body says otherwise.
_DEFAULTS: dict[str, Any] = {
    "background": False,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": False,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
}


class ResponseFormat(GenerationFormat):
    """The reply to one body: a message, or calls of functions."""

    prefix = "resp_"

    def __init__(
        self, generation: Generation, echoed: Mapping[str, Any], calls: Calls, token_names: TokenNames | None
    ) -> None:
        """`echoed` are the fields of the body that come back. `token_names` None: no log-probabilities are wanted."""
        super().__init__(generation)
        inside = {name: _DEFAULTS[name] | echoed.get(name, {}) for name in ("text", "reasoning")}
        self._echoed = {**_DEFAULTS, **echoed, **inside}
        self._calls = calls
        self._stream = calls.stream()
        self._token_names = token_names
        self._items: list[dict[str, Any]] = []
        self._unsaid: list[TokenLogprobs] = []  # of tokens whose text is held back, or is not there
        self._num_events = 0

    def request(self, **common: Any) -> Request:
        return Request(**common, continues_prompt=False)

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        return "".join(self._news(output, progress))

    def whole(self, progress: Sequence[Progress]) -> str:
        """The last event of a stream has been sent with the last news."""
        (reply,) = progress
        if self.stream:
            return ""
        self._news(reply, reply)
        return to_json(self._response(reply)) + "\n"

    def failure(self, error: RequestError) -> str:
        if not self.stream:
            return error.as_json()
        return self._event("error", message=str(error), param=error.param, code=error.code or str(error.status))

    def _news(self, news: Output | Progress, progress: Progress) -> list[str]:
        """The events for what is new, which may be a whole reply."""
        events: list[str] = []
        if not self._num_events:
            for name in ("created", "in_progress"):
                events.append(self._event(f"response.{name}", response=self._response(None)))
        self._unsaid += news.logprobs
        pieces = [self._stream.push(news.text)]
        if news.finish_reason is not None:
            pieces.append(self._stream.finish())
        content, calls = "".join(piece.content for piece in pieces), [call for piece in pieces for call in piece.calls]
        is_end = news.finish_reason is not None
        if content or (is_end and not calls and not self._items):
            events += self._say(content, self._unsaid)
            self._unsaid = []
        for call in calls:
            if self._calls.several or call.index == 0:
                events += self._call(call)
        if is_end:
            is_cut = news.finish_reason != "stop"
            if self._unsaid and self._items[0]["type"] == "message":
                events += self._say("", self._unsaid)
            events += self._end_item("incomplete" if is_cut else "completed")
            events.append(
                self._event(f"response.{'incomplete' if is_cut else 'completed'}", response=self._response(progress))
            )
        return events

    def _say(self, text: str, logprobs: Sequence[TokenLogprobs]) -> list[str]:
        events: list[str] = []
        if not self._items:
            item = {"id": self._item_id("msg"), "type": "message", "status": "in_progress", "role": "assistant"}
            events += self._begin_item(item | {"content": []})
            self._items[-1]["content"] = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            events.append(self._part_event("response.content_part.added", part=self._items[-1]["content"][0]))
        (part,) = self._items[-1]["content"]
        new = response_logprobs(self._token_names, logprobs) if self._token_names else []
        part["text"] += text
        part["logprobs"] += new
        if text:
            events.append(self._part_event("response.output_text.delta", delta=text, logprobs=new))
        return events

    def _call(self, call: CallDelta) -> list[str]:
        events: list[str] = []
        if call.id is not None:
            events += self._end_item("completed")
            item = {"id": self._item_id("fc"), "type": "function_call", "status": "in_progress"}
            events += self._begin_item(item | {"call_id": call.id, "name": call.name, "arguments": ""})
        self._items[-1]["arguments"] += call.arguments
        if call.arguments:
            events.append(self._item_event("response.function_call_arguments.delta", delta=call.arguments))
        return events

    def _begin_item(self, item: dict[str, Any]) -> list[str]:
        self._items.append(item)
        return [self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)]

    def _end_item(self, status: str) -> list[str]:
        if not self._items:
            return []
        item = self._items[-1]
        item["status"] = status
        events: list[str] = []
        if item["type"] == "message":
            (part,) = item["content"]
            events.append(self._part_event("response.output_text.done", text=part["text"], logprobs=part["logprobs"]))
            events.append(self._part_event("response.content_part.done", part=part))
        else:
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self._item_event("response.function_call_arguments.done", **done))
        return [*events, self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)]

    def _item_id(self, prefix: str) -> str:
        return f"{prefix}_{self.call_id}_{len(self._items)}"

    def _part_event(self, kind: str, **fields: Any) -> str:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> str:
        return self._event(kind, item_id=self._items[-1]["id"], output_index=len(self._items) - 1, **fields)

    def _event(self, kind: str, **fields: Any) -> str:
        number, self._num_events = self._num_events, self._num_events + 1
        return f"event: {kind}\ndata: {to_json({'type': kind, 'sequence_number': number, **fields})}\n\n"

    def _response(self, reply: Progress | None) -> dict[str, Any]:
        """The response, as far as it is known; `reply` None: nothing is yet."""
        is_cut = reply is not None and reply.finish_reason != "stop"
        return {
            "id": self.reply_id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None if reply is None or is_cut else int(time.time()),
            "model": self.generation.model,
            "status": "in_progress" if reply is None else "incomplete" if is_cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [] if reply is None else self._items,
            "usage": None if reply is None else self._usage(reply),
            **self._echoed,
        }

    def _usage(self, reply: Progress) -> dict[str, Any]:
        (prompt,) = self.generation.prompts
        return {
            "input_tokens": len(prompt.ids),
            "input_tokens_details": {"cached_tokens": reply.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": reply.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": len(prompt.ids) + reply.num_tokens,
        }
