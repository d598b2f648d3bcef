"""How tokens are named and placed with a SentencePiece vocabulary, where words begin with a space that is not shown at
the start of a text, and characters may be pieces and bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from handler.openai.logprobs import CompletionLogprobs, TokenNames
from llama2.engine.sequence import TokenLogprobs
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from tests.handler.openai.support import make_server
from tests.support.tokenizers import tiny_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece(tmp_path_factory.mktemp("llama2")))


@pytest.mark.parametrize("text", ["The capital of France", "two  spaces", "Grüße aus München", "今日は 🦙!"])
def test_an_offset_is_where_a_token_begins_in_the_text(tokenizer: Tokenizer, text: str) -> None:
    names = TokenNames(tokenizer)
    ids = tokenizer.encode_prompt(text)
    writer = CompletionLogprobs(names, tokenizer, starts_text=True)
    written = writer.write(ids, [None] * len(ids))
    assert tokenizer.decode(ids) == text
    places = list(zip(written["tokens"], written["text_offset"], strict=True))
    for token, offset in places[2:]:
        assert token.startswith("bytes:") or text.startswith(token, offset)
    # BOS has no width, and the first word is shown without its space.
    assert [offset for _, offset in places[:2]] == [0, 0]
    assert places[2][1] == len(tokenizer.decode(ids[:2]))


def test_an_echoed_prompt_is_the_start_of_a_text_and_a_reply_is_not(tokenizer: Tokenizer, tmp_path: Path) -> None:
    server = make_server(tmp_path, tokenizer=tokenizer)
    body = {"prompt": "The capital", "echo": True, "logprobs": 0, "max_tokens": 0}
    (choice,) = server.say("completions", "", finish_reason="length", **body)["choices"]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert (choice["text"], tokens[0]) == ("The capital", "<s>")
    assert offsets[-1] + len(tokens[-1]) == len(choice["text"])


def test_of_two_tokens_with_one_name_the_likelier_counts(tokenizer: Tokenizer) -> None:
    """The letter e and the byte 0x65."""
    letter, byte = (index for index in reversed(range(512)) if tokenizer.token_bytes(index) == b"e")
    entry = TokenLogprobs(token_id=byte, logprob=-9.0, top=((letter, -0.1), (byte, -9.0)))
    writer = CompletionLogprobs(TokenNames(tokenizer), tokenizer, starts_text=False)
    assert writer.write([byte], [entry])["top_logprobs"] == [{"e": -0.1}]


def test_spelling_shows_special_tokens_and_hides_the_space_before_the_first_word(tokenizer: Tokenizer) -> None:
    assert TokenNames(tokenizer).spell(tokenizer.encode_prompt("The capital")) == "<s>The capital"
