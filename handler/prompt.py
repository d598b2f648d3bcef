"""Owns what happens to a prompt that is longer than the server takes: it is refused, or cut at its left end.

Knows no dialog: what becomes of one is the chat format's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handler.config import HandlerConfig
from handler.errors import RequestError
from llama2.errors import InvalidValue
from llama2.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """The ids of one prompt, and what was cut off its left end."""

    ids: tuple[int, ...]
    dropped: tuple[int, ...] = ()

    @property
    def truncated(self) -> int:
        return len(self.dropped)


def check_length(least: int, *, place: str, config: HandlerConfig) -> None:
    """Refuse a prompt of `least` tokens or more, where one of `least` is refused: before it costs being tokenized.

    Raises:
        RequestError: as `fit`.
    """
    if config.truncation == "error" and least > config.max_input_tokens:
        raise _too_long(place, f"at least {least}", config)


def encode_text(
    text: str,
    *,
    place: str,
    config: HandlerConfig,
    tokenizer: Tokenizer,
    with_bos: bool = True,
    is_cut: bool = False,
) -> list[int]:
    """The ids of a text that is gone on with, behind a BOS where the model was trained with one. `is_cut`: no length is
    too long.

    Raises:
        InvalidValue: it is not valid Unicode; `place` is the field that it came in.
        RequestError: it is too long, whatever its tokens are.
    """
    try:
        if not is_cut:
            check_length(tokenizer.fewest_tokens(text), place=place, config=config)
        return tokenizer.encode_prompt(text) if with_bos else tokenizer.encode(text)
    except RequestError:
        raise
    except ValueError as error:
        raise InvalidValue(place, f"cannot be encoded: {error}") from None


def fit(
    ids: Sequence[int], *, place: str, config: HandlerConfig, bos_id: int | None, max_new_tokens: int | None
) -> Prompt:
    """Refuse or cut a prompt that is too long, as `truncation` says. A cut one leaves room for the reply that it asks
    for, but for no more than half of max_seq_len.

    Raises:
        InvalidValue: it is empty; `place` is the field that it came in.
        RequestError: it is too long.
    """
    limit = config.max_input_tokens
    if not ids:
        raise InvalidValue(place, "must not be empty")
    if len(ids) <= limit:
        return Prompt(ids=tuple(ids))
    if config.truncation == "error":
        raise _too_long(place, str(len(ids)), config)
    max_seq_len = config.engine.max_seq_len
    room = max(max_seq_len - (max_new_tokens or 1), max_seq_len // 2)
    return cut_left(ids, max(min(limit, room), 1), bos_id)


def _too_long(place: str, length: str, config: HandlerConfig) -> RequestError:
    return RequestError(
        f"{place} has {length} tokens, but at most {config.max_input_tokens} are taken",
        param=place,
        code="context_length_exceeded",
    )


def cut_left(ids: Sequence[int], keep: int, bos_id: int | None) -> Prompt:
    """The last `keep` ids; a BOS at the beginning stays, and counts."""
    num_bos = 1 if ids[0] == bos_id and keep > 1 else 0
    start = max(len(ids) - keep + num_bos, num_bos)
    return Prompt(ids=(*ids[:num_bos], *ids[start:]), dropped=tuple(ids[num_bos:start]))
