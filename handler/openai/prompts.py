"""Owns the way from the prompt or the messages of an OpenAI body to ids that fit.

Knows no sampling and no reply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.openai.schema import AssistantMessage, Message, Tool, ToolChoice, ToolMessage
from handler.prompt import Prompt, cut_left, fit
from llama2.text.tokenizer import Tokenizer
from llama2.text.tools import ToolPrompt, prepare

_TURN = re.compile(r"turn (\d+): ")
_TOOL_FIELD = re.compile(r"tools?[\w.\[\]]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """All ids of one prompt, before any are cut off; `place` is the field that it came in."""

    ids: list[int]
    place: str


class PromptReader:
    """Encodes prompts for one model, within the limits of one server."""

    def __init__(self, tokenizer: Tokenizer, config: HandlerConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config

    def completion(self, prompt: str | list[str] | list[int] | list[list[int]]) -> list[Encoded]:
        """Texts get a BOS where the model was trained with one; ids are taken as they are.

        Raises:
            RequestError: there is no prompt, or a text is not valid Unicode.
        """
        if not prompt and isinstance(prompt, list):
            raise RequestError("prompt must not be empty", param="prompt", code="invalid_value")
        if isinstance(prompt, str):
            return [self.text(prompt, "prompt")]
        if isinstance(prompt[0], int):
            return [Encoded(ids=prompt, place="prompt")]
        return [
            self.text(item, place) if isinstance(item, str) else Encoded(ids=cast("list[int]", item), place=place)
            for place, item in ((f"prompt[{index}]", item) for index, item in enumerate(prompt))
        ]

    def text(self, text: str, place: str, *, with_bos: bool = True) -> Encoded:
        try:
            ids = self._tokenizer.encode_prompt(text) if with_bos else self._tokenizer.encode(text)
        except ValueError as error:
            raise RequestError(f"{place}: {error}", param=place, code="invalid_value") from None
        return Encoded(ids=ids, place=place)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Tool] | None = None,
        tool_choice: str | ToolChoice | None = None,
        *,
        special_tags: Literal["reject", "encode"] | None = None,
    ) -> ToolPrompt:
        """The prompt that the assistant answers next. `special_tags` None: what the server says of them.

        Raises:
            RequestError: a tool is wrong (400); the model's chat format has no place for such a dialog (422).
        """
        try:
            return prepare(
                self._tokenizer,
                messages,
                None if tools is None else [tool.model_dump(exclude_none=True) for tool in tools],
                tool_choice.model_dump() if isinstance(tool_choice, ToolChoice) else tool_choice,
                special_tags=special_tags or self._config.special_tags,
            )
        except ValueError as error:
            text = str(error)
            if field := _TOOL_FIELD.match(text):
                raise RequestError(text, param=field[0], code="invalid_value") from None
            turn = _TURN.match(text)
            param = f"messages[{int(turn[1]) - 1}]" if turn else "messages"
            message = f"{param}: {text[turn.end() :] if turn else text}"
            raise RequestError(message, param=param, status=422, code="invalid_prompt") from None

    def fit(self, encoded: Encoded, *, max_new_tokens: int | None, asked: bool, truncate: int | None) -> Prompt:
        """Cut to the last `truncate` ids, -1 for as many as are taken; then to what the server takes.

        `asked`: the reply is to have up to `max_new_tokens`, so these must fit in behind the prompt.

        Raises:
            RequestError: it is empty or too long.
        """
        ids, dropped = encoded.ids, tuple[int, ...]()
        bos_id = self._tokenizer.bos_id
        if truncate is not None and ids:
            keep = self._config.max_input_tokens if truncate == -1 else truncate
            if keep == 0:
                raise RequestError("truncate_prompt_tokens must leave a token", param="truncate_prompt_tokens")
            first = cut_left(ids, keep, bos_id)
            ids, dropped = list(first.ids), first.dropped
        prompt = fit(ids, place=encoded.place, config=self._config, bos_id=bos_id, max_new_tokens=max_new_tokens)
        longest, length = self._config.engine.max_seq_len, len(prompt.ids)
        if asked and max_new_tokens is not None and length + max_new_tokens > longest:
            raise RequestError(
                f"this model's maximum context length is {longest} tokens, but {length + max_new_tokens} were asked "
                f"for: {length} in {encoded.place} and {max_new_tokens} for the reply",
                param=encoded.place,
                code="context_length_exceeded",
            )
        return Prompt(ids=prompt.ids, dropped=dropped + prompt.dropped)


def plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the model's chat format knows them: no developers, and contents in one piece."""
    return [_plain(message) for message in messages]


def _plain(message: Message) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        content = "".join(part.text for part in content)
    if isinstance(message, ToolMessage):
        return {"role": "tool", "content": content, "tool_call_id": message.tool_call_id}
    if isinstance(message, AssistantMessage):
        if message.tool_calls:
            calls = [call.model_dump() for call in message.tool_calls]
            return {"role": "assistant", "content": content, "tool_calls": calls}
        return {"role": "assistant", "content": content or ""}
    return {"role": "system" if message.role == "developer" else message.role, "content": content}
