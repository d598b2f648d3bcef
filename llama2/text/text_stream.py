"""Owns streaming: token ids become text that is safe to show, one token at a time, and stop strings are found.

Knows no model and no vocabulary file: it asks the tokenizer for each token's bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama2.text.tokenizer import Tokenizer


class TextStream:
    """The text of one request, growing token by token.

    A character is shown once its last byte has arrived, and text that could begin a stop string is held back until it
    is clear that it does not. The stop string that ends first wins; of several that end with the same character, the
    longest. What is shown therefore does not depend on how the text was split into tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), continues_prompt: bool = True) -> None:
        """`continues_prompt` False: a new text, without the space that SentencePiece puts before a first word."""
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = tokenizer.text_decoder()
        self._matchers = [_Matcher(text) for text in stop]
        self._first = not continues_prompt
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take the next token and return the text that is now safe to show, "" after a stop string."""
        data = self._tokenizer.token_bytes(token_id, first=self._first)
        if self._first:
            self._first = not self._tokenizer.token_bytes(token_id)
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back, when generation ends without a stop string. An unfinished character becomes U+FFFD."""
        shown = self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return shown + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._matchers:
            return text
        self._held += text
        start = len(self._held) - len(text)
        for end, character in enumerate(text, start=start + 1):
            lengths = [matcher.length for matcher in self._matchers if matcher.advance(character)]
            if lengths:
                self.stopped = True
                shown, self._held = self._held[: end - max(lengths)], ""
                return shown
        safe = len(self._held) - max(matcher.matched for matcher in self._matchers)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown


class _Matcher:
    """Finds one string in a text that arrives by character, in constant time each (Knuth, Morris, Pratt 1977).

    `matched` is the length of the string's longest prefix that ends the text so far.
    """

    def __init__(self, text: str) -> None:
        self.length = len(text)
        self.matched = 0
        self._text = text
        # At i: the length of the longest proper prefix of text[: i + 1] that is also its suffix.
        self._borders = [0] * len(text)
        border = 0
        for index in range(1, len(text)):
            border = self._extend(border, text[index])
            self._borders[index] = border

    def advance(self, character: str) -> bool:
        """True if the string ends with this character."""
        self.matched = self._extend(self.matched, character)
        return self.matched == self.length

    def _extend(self, matched: int, character: str) -> int:
        while matched and character != self._text[matched]:
            matched = self._borders[matched - 1]
        return matched + 1 if character == self._text[matched] else 0
