"""Owns the prompt inspector: every id of a prompt with its text and where it came from, and what looks wrong with it.

Knows no chat format: it finds out where a message went by writing the same dialog with other words.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from handler.errors import RequestError
from handler.openai.generation import Model
from handler.openai.prompts import Encoded
from handler.openai.replies import Immediate
from handler.prompt import Prompt
from llama2.errors import InvalidValue
from llama2.text.dialog import Message, Tool

# Llama 2's tags are text, and so are those of tools where a model has none of its own.
_TAGS = re.compile(rb"\[/?INST\]|<</?SYS>>|</?tool_(?:call|response)>")
_EMPTY_SYSTEM = re.compile(r"<<SYS>>\s*<</SYS>>")
# Characters for private use that no message has stand for the messages.
_STAND_INS = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Span:
    """The bytes from `start` to `end` of a prompt's text."""

    start: int
    end: int
    role: str


def inspected(name: str, reports: list[dict[str, Any]]) -> Immediate:
    return Immediate(reply={"object": "prompt.inspection", "model": name, "prompts": reports})


class Inspector:
    """Looks at prompts of one model."""

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.tokenizer
        self._prompts = model.prompts
        self._names = model.token_names

    def dialog(
        self,
        prompt: Prompt,
        encoded: Encoded,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template_kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """`encoded` is the whole prompt that `messages` became, `prompt` what truncation left of it."""

        def write(others: Sequence[Message]) -> bytes:
            encoded = self._prompts.chat(
                others, tools, template_kwargs=template_kwargs, special_tags="encode", is_cut=True
            )
            return self._text(encoded.ids)

        spans = _locate(self._text(encoded.ids), messages, write)
        lint = [
            _finding("empty_system", f"messages[{index}] is a system prompt without text")
            for index, message in enumerate(messages)
            if message.role == "system" and not message.content.strip()
        ]
        try:
            self._prompts.chat(messages, tools, template_kwargs=template_kwargs, special_tags="reject", is_cut=True)
        except (InvalidValue, RequestError) as error:
            lint.append(_finding("tag_in_message", str(error)))
        return self._report(prompt, encoded.ids, spans, "template", lint)

    def text(self, prompt: Prompt, ids: Sequence[int]) -> dict[str, Any]:
        """`ids` is the whole prompt of a completion, `prompt` what truncation left of it."""
        text = self._tokenizer.decode(ids)
        lint = [
            _finding("tag_as_text", f"the prompt spells {piece!r}, which is encoded as text and controls nothing")
            for piece in self._tokenizer.special_tokens
            if piece in text
        ]
        if _EMPTY_SYSTEM.search(text):
            lint.append(_finding("empty_system", "<<SYS>> and <</SYS>> have nothing between them"))
        bos = self._tokenizer.encode_prompt("")[:1]
        if bos and list(ids[:1]) != bos:
            lint.append(_finding("no_bos", f"the prompt does not begin with BOS ({bos[0]}), as the model was trained"))
        return self._report(prompt, ids, [], "prompt", lint)

    def _report(
        self, prompt: Prompt, ids: Sequence[int], spans: list[_Span], other: str, lint: list[dict[str, str]]
    ) -> dict[str, Any]:
        tokens = [
            {"id": token_id, "text": self._names.name(token_id), "role": role}
            for token_id, role in zip(ids, self._roles(ids, spans, other), strict=True)
        ]
        # Truncation keeps a BOS in front of what it drops.
        start = 1 if prompt.dropped and prompt.ids[0] == ids[0] == self._tokenizer.bos_id else 0
        end = start + prompt.truncated
        bos = self._tokenizer.bos_id
        lint = [
            *(
                _finding("bos_twice", f"BOS ({bos}) stands twice, at positions {index} and {index + 1}")
                for index, pair in enumerate(pairwise(ids))
                if bos is not None and pair == (bos, bos)
            ),
            *lint,
        ]
        dropped = {"num_tokens": end - start, "text": self._tokenizer.decode(prompt.dropped)}
        return {
            "ids": list(prompt.ids),
            "num_tokens": len(prompt.ids),
            "tokens": tokens[:start] + tokens[end:],
            "truncated": {**dropped, "tokens": tokens[start:end]} if prompt.dropped else None,
            "lint": lint,
        }

    def _roles(self, ids: Sequence[int], spans: list[_Span], other: str) -> Iterator[str]:
        data = self._text(ids)
        tags = [_Span(start=match.start(), end=match.end(), role="tag") for match in _TAGS.finditer(data)]
        special = set(self._tokenizer.special_tokens.values())
        # Of each kind those that end behind the current token, the next one last: what is passed is dropped.
        ahead = [spans[::-1], tags[::-1]]
        end = 0
        before: int | None = None
        for token_id in ids:
            start, end = end, end + len(self._bytes(token_id))
            for kind in ahead:
                while kind and kind[-1].end <= start:
                    kind.pop()
            if token_id in special:
                yield self._special_role(token_id, before)
            else:
                # A tag inside a message is the message's; a token across a border belongs to what was said.
                touched = [kind[-1].role for kind in ahead if kind and kind[-1].start < end]
                yield touched[0] if touched else other
            before = token_id

    def _special_role(self, token_id: int, before: int | None) -> str:
        """BOS begins a text. Some formats have the same token inside of it, where it begins a turn."""
        bos, ends = self._tokenizer.bos_id, self._tokenizer.eos_ids
        if token_id == bos and (before is None or before == bos or before in ends):
            return "BOS"
        return "EOS" if token_id in ends else "tag"

    def _text(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self._bytes, ids))

    def _bytes(self, token_id: int) -> bytes:
        return self._tokenizer.token_bytes(token_id) or self._names.name(token_id).encode()


def _locate(text: bytes, messages: Sequence[Message], write: Callable[[Sequence[Message]], bytes]) -> list[_Span]:
    """Where each message stands in `text`; nothing if the template does more with messages than to place them."""
    said = [index for index, message in enumerate(messages) if message.content.strip()]
    taken = set("".join(messages[index].content for index in said))
    free = (chr(code) for code in _STAND_INS if chr(code) not in taken)
    stand_ins = dict(zip(said, free, strict=False))
    others = [
        dataclasses.replace(message, content=stand_ins.get(index, message.content))
        for index, message in enumerate(messages)
    ]
    written, end = write(others), 0
    frame: list[bytes] = []
    for stand_in in map(str.encode, stand_ins.values()):
        start = written.find(stand_in, end)
        if start < 0:
            return []
        frame.append(written[end:start])
        end = start + len(stand_in)
    frame.append(written[end:])
    if len(frame) != len(said) + 1 or not text.startswith(frame[0]):
        return []
    spans: list[_Span] = []
    end = len(frame[0])
    for index, after in zip(said, frame[1:], strict=True):
        content = messages[index].content
        fitting = [form for form in _forms(content) if text.startswith(form + after, end)]
        if not fitting:
            return []
        spans.append(_Span(start=end, end=end + len(fitting[0]), role=messages[index].role))
        end += len(fitting[0]) + len(after)
    return spans


def _forms(content: str) -> list[bytes]:
    """What templates make of a content: itself, or without the white space at its ends."""
    return [form.encode() for form in (content, content.strip(), content.rstrip(), content.lstrip())]


def _finding(rule: str, message: str) -> dict[str, str]:
    return {"rule": rule, "message": message}
