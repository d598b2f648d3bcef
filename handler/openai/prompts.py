"""Owns the way from the prompt or the messages of a body to ids that fit.

Knows no sampling and no reply.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from handler.config import HandlerConfig
from handler.errors import RequestError
from handler.prompt import Prompt, check_length, cut_left, encode_text, fit
from llama2.errors import InvalidValue
from llama2.text.chat import SpecialTags, encode_messages
from llama2.text.dialog import Message, Tool
from llama2.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """All ids of one prompt, before any are cut off; `place` is the field that it came in."""

    ids: list[int]
    place: str


class PromptReader:
    """Encodes prompts for one model, within the limits of one server.

    `is_cut`: the body itself says how much of its prompt to keep, so that no length is too long.
    """

    def __init__(self, tokenizer: Tokenizer, config: HandlerConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config

    def completion(
        self, prompt: str | list[str] | list[int] | list[list[int]], *, is_cut: bool = False
    ) -> list[Encoded]:
        """Texts get a BOS where the model was trained with one; ids are taken as they are.

        Raises:
            InvalidValue: there is no prompt, or a text is not valid Unicode.
            RequestError: a text is too long, whatever its tokens are.
        """
        if not prompt and isinstance(prompt, list):
            raise InvalidValue("prompt", "must not be empty")
        if isinstance(prompt, str):
            return [self.text(prompt, "prompt", is_cut=is_cut)]
        if isinstance(prompt[0], int):
            return [Encoded(ids=prompt, place="prompt")]
        return [
            self.text(item, place, is_cut=is_cut)
            if isinstance(item, str)
            else Encoded(ids=cast("list[int]", item), place=place)
            for place, item in ((f"prompt[{index}]", item) for index, item in enumerate(prompt))
        ]

    def text(self, text: str, place: str, *, with_bos: bool = True, is_cut: bool = False) -> Encoded:
        ids = encode_text(
            text, place=place, config=self._config, tokenizer=self._tokenizer, with_bos=with_bos, is_cut=is_cut
        )
        return Encoded(ids=ids, place=place)

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        *,
        place: str = "messages",
        template_kwargs: Mapping[str, Any] | None = None,
        special_tags: SpecialTags | None = None,
        is_cut: bool = False,
    ) -> Encoded:
        """The prompt that the assistant answers next. `special_tags` None: what the server says of them.

        Raises:
            InvalidValue: a tool is wrong.
            RequestError: the model's chat format has no place for such a dialog, or it is too long, whatever its
                tokens are.
        """
        check = functools.partial(check_length, place=place, config=self._config)
        try:
            ids = encode_messages(
                self._tokenizer,
                messages,
                tools=tools,
                special_tags=special_tags or self._config.special_tags,
                dialog_turns=self._config.dialog_turns,
                template_kwargs=template_kwargs,
                check_length=None if is_cut else check,
            )
        except RequestError:
            raise
        except ValueError as error:
            if isinstance(error, InvalidValue) and error.field == "tools":
                raise
            if not isinstance(error, InvalidValue) or place != "messages":
                error = InvalidValue(place, f"cannot be written: {error}")
            raise RequestError.of(error, code="invalid_prompt") from None
        return Encoded(ids=ids, place=place)

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
                raise InvalidValue("truncate_prompt_tokens", "must leave a token")
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
