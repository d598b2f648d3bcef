"""Owns how log-probabilities are written: a completion's four lists, and a chat's list of objects.

Knows no request and no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama2.engine.sequence import TokenLogprobs
from llama2.text.tokenizer import Tokenizer


class TokenNames:
    """A token's name in a reply: its text, its spelling if it is special, its bytes if they are not text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {token_id: piece for piece, token_id in tokenizer.special_tokens.items()}

    def name(self, token_id: int) -> str:
        if token_id in self._special:
            return self._special[token_id]
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def spell(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens, special ones spelled out."""
        parts: list[bytes] = []
        first = True
        for token_id in token_ids:
            special = self._special.get(token_id)
            parts.append(self._tokenizer.token_bytes(token_id, first=first) if special is None else special.encode())
            first = first and special is not None
        return b"".join(parts).decode(errors="replace")

    def data(self, token_id: int) -> list[int] | None:
        """Its bytes in a text, if it has any."""
        return list(self._tokenizer.token_bytes(token_id)) or None


def chat_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def token(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": names.name(token_id), "logprob": logprob, "bytes": names.data(token_id)}

    content = [
        {**token(entry.token_id, entry.logprob), "top_logprobs": [token(*one) for one in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def response_logprobs(names: TokenNames, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
    """`logprobs` of a response's text: those of a chat, except that no bytes are an empty list."""
    content: list[dict[str, Any]] = chat_logprobs(names, entries)["content"]
    for token in (one for entry in content for one in (entry, *entry["top_logprobs"])):
        token["bytes"] = token["bytes"] or []
    return content


class CompletionLogprobs:
    """`logprobs` of one completion choice, piece by piece. `text_offset` counts characters of the choice's text."""

    def __init__(self, names: TokenNames, tokenizer: Tokenizer, *, starts_text: bool) -> None:
        """`starts_text`: the first token begins a text, and does not continue a prompt."""
        self._names = names
        self._tokenizer = tokenizer
        self._decoder = tokenizer.text_decoder()
        self._first = starts_text
        self._offset = 0

    def write(self, token_ids: Sequence[int], entries: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """The next tokens. One without an entry has no probability, since nothing precedes it."""
        return {
            "tokens": [self._names.name(token_id) for token_id in token_ids],
            "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry) for entry in entries],
            "text_offset": [self._advance(token_id) for token_id in token_ids],
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """Likeliest first. Of two tokens of the same name the likelier one counts; the token itself always does."""
        top: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            top.setdefault(self._names.name(token_id), logprob)
        return top

    def _advance(self, token_id: int) -> int:
        offset = self._offset
        data = self._tokenizer.token_bytes(token_id, first=self._first)
        self._first = self._first and not self._tokenizer.token_bytes(token_id)
        self._offset += len(self._decoder.decode(data))
        return offset
