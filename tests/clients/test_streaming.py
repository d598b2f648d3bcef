"""A stream says what the whole reply says, character for character, whatever the text and wherever it is stopped."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.clients.conftest import Service

pytestmark = pytest.mark.clients

PROMPTS = 200
PIECES = [
    *("🙂", "👩‍👩‍👧‍👦", "🇫🇷🇯🇵", "👍🏽", "🦀🦀", "❤️", "🏳️‍🌈", "✨"),
    *("今日は天気がいいですね", "東京", "你好,世界", "中文", "안녕하세요", "カタカナ", "。", "漢字"),
    *("  ", "   ", "     ", "         ", "\n", "\n\n", "\t", " \n "),
    *("The", " lighthouse", "hello world", "é", "e\u0301", "naïve", "def f(x):", "{'a': 1}", "1, 2, 3,", "—", "Ω≈ç"),
]


class Speaker:
    """One client's requests for one random prompt."""

    def __init__(self, client: openai.OpenAI, model: str, index: int) -> None:
        self.random = random.Random(index)
        prompt = "".join(self.random.choices(PIECES, k=self.random.randint(3, 9)))
        # Asked to go on with more of the same, a model writes emoji and ideographs.
        prompt += self.random.choice(PIECES[:16]) * self.random.randint(0, 3)
        self.fields: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": self.random.randint(8, 12)}
        self.chats = index % 4 == 3
        if self.chats:
            self.fields["messages"] = [{"role": "user", "content": f"Repeat: {prompt}"}]
            self.create: Any = client.chat.completions.create
        else:
            self.fields["prompt"] = prompt
            self.create = client.completions.create

    def whole(self, **fields: Any) -> tuple[str, str]:
        """The text, and why it ends."""
        choice = self.create(**self.fields, **fields).choices[0]
        return (choice.message.content if self.chats else choice.text) or "", choice.finish_reason

    def deltas(self, **fields: Any) -> tuple[list[str], str]:
        choices = [chunk.choices[0] for chunk in self.create(**self.fields, **fields, stream=True)]
        said = [(choice.delta.content if self.chats else choice.text) or "" for choice in choices]
        return [text for text in said if text], choices[-1].finish_reason

    def stop(self, deltas: list[str]) -> str | None:
        """The end of one delta and the start of the next: a string across token borders."""
        # A reply cut off within a character ends with U+FFFD, which no token says.
        pairs = [pair for pair in itertools.pairwise(deltas) if "\ufffd" not in pair[1]]
        if not pairs:
            return None
        before, after = self.random.choice(pairs)
        return before[-self.random.randint(1, len(before)) :] + after[: self.random.randint(1, len(after))]


@pytest.mark.timeout(900)
def test_two_hundred_streams_equal_their_whole_replies(service: Service, model: str) -> None:
    """Eight at once; every other one again with a stop string across two tokens of what it said."""

    def speak(index: int) -> tuple[str, bool]:
        speaker = Speaker(client, model, index)
        text, reason = speaker.whole()
        deltas, streamed_reason = speaker.deltas()
        assert ("".join(deltas), streamed_reason) == (text, reason), speaker.fields
        stop = speaker.stop(deltas) if index % 2 == 0 else None
        if stop is None:
            return text, False
        expected = text[: text.index(stop)], "stop"
        assert speaker.whole(stop=stop) == expected, (speaker.fields, stop)
        stopped, streamed_reason = speaker.deltas(stop=[stop])
        assert ("".join(stopped), streamed_reason) == expected, (speaker.fields, stop)
        return text, True

    with (
        openai.OpenAI(base_url=service.base_url, api_key=service.key, max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        said = list(pool.map(speak, range(PROMPTS)))
    texts = [text for text, _ in said]
    assert sum(stopped for _, stopped in said) > PROMPTS // 3
    assert sum(any(ord(letter) > 0x2E80 for letter in text) for text in texts) > PROMPTS // 5
    assert sum("  " in text for text in texts) > 5
