"""Owns the project's own API: `{"prompt": …}` and `{"dialog": […]}` bodies to engine requests, and results to replies.

A body holds `prompt` (a string, or a list of them) or `dialog` (a list of {"role", "content"} messages, or a list of
such lists); any field of SamplingParams but `n` and `logit_bias`; and `mode`, `stream`, `adapter`. The reply to one of
them is

    {"generation": "…", "finish_reason": "stop" | "length", "usage": {"prompt_tokens": 5, "completion_tokens": 50}}

where a chat's generation is {"role": "assistant", "content": "…"}; the reply to a list is a list of these. With
`"logprobs": n` comes "logprobs", one {"token", "token_id", "logprob", "top"} per generated token. A prompt that was
cut (`truncation: left`) has "truncated_tokens" in its usage.

With `"stream": true` the reply is NDJSON, one object per line: {"text": "…"} for each piece, and on the last line of a
prompt also "finish_reason" and "usage". In the reply to a list each line says which one it belongs to: {"index": 0, …}.

Knows no torch, no TorchServe and no engine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from handler.adapters import Adapters
from handler.call import Progress
from handler.config import HandlerConfig, Mode
from handler.errors import RequestError, unknown_field
from handler.prompt import Prompt, check_length, encode_text, fit
from llama2.adapters.reference import AdapterRef
from llama2.engine.sampling_params import SamplingParams, with_completion_tokens
from llama2.engine.sequence import Output, Request, TokenLogprobs
from llama2.errors import InvalidValue, shown
from llama2.text.chat import encode_dialog
from llama2.text.tokenizer import Tokenizer

MAX_PROMPTS = 64
_SAMPLING_FIELDS = {field.name for field in dataclasses.fields(SamplingParams)} - {"n", "logit_bias"}
_FIELDS = _SAMPLING_FIELDS | {"prompt", "dialog", "mode", "stream", "adapter"}
# What only OpenAI's API has, by the names that users know, and as it is written there.
_OPENAI_FIELDS = {
    "messages": '"messages": [{"role": "user", "content": "Hi"}]',
    "input": '"input": "Hi"',
    "tools": '"tools": [{"type": "function", "function": {"name": "add"}}]',
    "response_format": '"response_format": {"type": "json_object"}',
    "json_schema": '"guided_json": {"type": "object"}',
    "regex": '"guided_regex": "[0-9]+"',
    "choice": '"guided_choice": ["yes", "no"]',
    "guided_json": '"guided_json": {"type": "object"}',
    "guided_regex": '"guided_regex": "[0-9]+"',
    "guided_choice": '"guided_choice": ["yes", "no"]',
    "n": '"n": 2',
    "logit_bias": '"logit_bias": {"42": -100}',
    "model": '"model": "llama"; here adapter names an adapter, and without it the model itself replies',
}
# Where those are taken that say themselves what a body is.
_OPENAI_PATHS = {"messages": "chat/completions", "tools": "chat/completions", "input": "responses"}


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeFormat:
    """One accepted body, and the way its replies are written."""

    tokenizer: Tokenizer
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    chat: bool
    is_list: bool
    stream: bool
    adapter: AdapterRef | None = None
    prepare: None = None

    @property
    def content_type(self) -> str:
        return "application/x-ndjson" if self.stream else "application/json"

    def requests(self, call_id: str) -> list[Request]:
        return [
            Request(
                request_id=f"{call_id}/{index}",
                prompt_ids=prompt.ids,
                params=self.params,
                continues_prompt=not self.chat,
                adapter=self.adapter,
            )
            for index, prompt in enumerate(self.prompts)
        ]

    def chunk(self, index: int, output: Output, progress: Progress) -> str:
        if not output.text and not output.logprobs and not output.finish_reason:
            return ""
        line: dict[str, Any] = {"index": index} if self.is_list else {}
        line |= {"text": output.text} | self._about(index, output.logprobs, progress)
        return json.dumps(line, ensure_ascii=False) + "\n"

    def whole(self, progress: Sequence[Progress]) -> str:
        if self.stream:
            return ""
        texts = [{"role": "assistant", "content": done.text} if self.chat else done.text for done in progress]
        replies = [
            {"generation": texts[index]} | self._about(index, done.logprobs, done)
            for index, done in enumerate(progress)
        ]
        return json.dumps(replies if self.is_list else replies[0], ensure_ascii=False) + "\n"

    def failure(self, error: RequestError) -> str:
        return error.as_json()

    def _about(self, index: int, logprobs: Sequence[TokenLogprobs], progress: Progress) -> dict[str, Any]:
        """What goes with a text, and at its end with all of it."""
        about: dict[str, Any] = {}
        if self.params.logprobs is not None:
            about["logprobs"] = [self._logprobs(entry) for entry in logprobs]
        if progress.finish_reason:
            prompt = self.prompts[index]
            usage = {"prompt_tokens": len(prompt.ids), "completion_tokens": progress.num_tokens}
            usage |= {"truncated_tokens": prompt.truncated} if prompt.truncated else {}
            about |= {"finish_reason": progress.finish_reason, "usage": usage}
        return about

    def _logprobs(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in entry.top]
        return self._token(entry.token_id, entry.logprob) | {"top": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        return {"token": token, "token_id": token_id, "logprob": logprob}


class NativeApi:
    """Reads bodies for one model."""

    def __init__(self, tokenizer: Tokenizer, config: HandlerConfig, adapters: Adapters | None = None) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._adapters = adapters or Adapters()

    def read(self, body: dict[str, Any] | str) -> NativeFormat:
        """A whole body is refused for one fault in it: nothing of it has run by then.

        Raises:
            InvalidValue: a field is unknown, missing, of a wrong type or out of range.
            RequestError: a prompt is too long, or there is no such adapter (404).
        """
        fields = {"prompt": body} if isinstance(body, str) else body
        for name, example in _OPENAI_FIELDS.items():
            if name in fields:
                path = _OPENAI_PATHS.get(name) or ("completions" if "prompt" in fields else "chat/completions")
                place = f"/predictions/llama/1.0/v1/{path}"
                raise InvalidValue(name, f"belongs to the OpenAI-compatible API, at {place}, as {example}")
        for name in fields:
            if name not in _FIELDS:
                raise unknown_field(name, _FIELDS)
        if ("prompt" in fields) == ("dialog" in fields):
            raise InvalidValue("prompt", "or dialog must be in the body, and not both")
        shape: Literal["prompt", "dialog"] = "dialog" if "dialog" in fields else "prompt"
        mode: Any = fields.get("mode", "chat" if shape == "dialog" else self._config.mode)
        if mode not in get_args(Mode) or (shape == "dialog" and mode != "chat"):
            allowed = "'chat' for a dialog" if shape == "dialog" else "'text_completion' or 'chat'"
            raise InvalidValue("mode", f"must be {allowed}, got {shown(mode)}")
        stream = fields.get("stream", False)
        if not isinstance(stream, bool):
            raise InvalidValue("stream", f"must be true or false, got {shown(stream)}")
        params = self._params(fields)
        if mode == "text_completion":
            params = with_completion_tokens(params)
        items = _items(shape, fields[shape])
        encoded = {place: self._encode(place, item, mode) for place, item in items.items()}
        return NativeFormat(
            tokenizer=self._tokenizer,
            prompts=tuple(self._fit(place, ids, params) for place, ids in encoded.items()),
            params=params,
            chat=mode == "chat",
            is_list=shape not in items,
            stream=stream,
            adapter=self._adapters.named(fields.get("adapter")),
        )

    def _params(self, fields: Mapping[str, Any]) -> SamplingParams:
        changes = {name: value for name, value in fields.items() if name in _SAMPLING_FIELDS}
        return dataclasses.replace(self._config.sampling, **changes)

    def _encode(self, place: str, item: Any, mode: Mode) -> list[int]:
        """A dialog is a chat. A prompt is what `mode` says: a text to go on with, or a user's one message."""
        if mode == "text_completion":
            return encode_text(item, place=place, config=self._config, tokenizer=self._tokenizer)
        dialog = [{"role": "user", "content": item}] if isinstance(item, str) else item
        try:
            return encode_dialog(
                self._tokenizer,
                dialog,
                special_tags=self._config.special_tags,
                dialog_turns=self._config.dialog_turns,
                check_length=functools.partial(check_length, place=place, config=self._config),
            )
        except RequestError:
            raise
        except InvalidValue as error:
            inside = "" if isinstance(item, str) else error.field.removeprefix("messages")
            raise InvalidValue(place + inside, error.problem) from None
        except ValueError as error:
            raise InvalidValue(place, f"cannot be encoded: {error}") from None

    def _fit(self, place: str, ids: list[int], params: SamplingParams) -> Prompt:
        return fit(
            ids,
            place=place,
            config=self._config,
            bos_id=self._tokenizer.bos_id,
            max_new_tokens=params.max_new_tokens,
        )


def _items(shape: Literal["prompt", "dialog"], value: Any) -> dict[str, Any]:
    """The prompts or dialogs of a body, by the path to each: one, which may stand alone, or a list of them."""
    kind, one = (str, "a string") if shape == "prompt" else (list, "a list of messages")
    if isinstance(value, kind) and (shape == "prompt" or (value and isinstance(value[0], dict))):
        return {shape: value}
    if not isinstance(value, list):
        raise InvalidValue(shape, f"must be {one} or a list of these, got {shown(value)}")
    if not 1 <= len(value) <= MAX_PROMPTS:
        raise InvalidValue(shape, f"must hold from 1 to {MAX_PROMPTS} at once, got {len(value)}")
    items = {f"{shape}[{index}]": item for index, item in enumerate(value)}
    for place, item in items.items():
        if not isinstance(item, kind):
            raise InvalidValue(place, f"must be {one}, got {shown(item)}")
    return items
