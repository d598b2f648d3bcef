"""The length of a text bounds the number of its tokens, without tokenizing it."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given

from llama2.text.tokenizer import Tokenizer, load_tokenizer
from tests.llama2.text.test_tokenizer import ANY_TEXT
from tests.support.tokenizers import tiny_sentencepiece


@given(text=ANY_TEXT)
def test_no_text_has_fewer_tokens_than_its_length_says(sp: Tokenizer, bpe: Tokenizer, text: str) -> None:
    for tokenizer in (sp, bpe):
        assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
        longest = max((tokenizer.token_bytes(index) for index in range(tokenizer.vocab_size)), key=len)
        text = longest.decode(errors="replace") * 50
        assert 50 <= tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))


def test_of_a_vocabulary_that_leaves_characters_out_no_length_says_anything(bpe: Tokenizer, tmp_path: Path) -> None:
    """Rather no bound than one that refuses a text which would have fitted."""
    definition = json.loads(bpe.files[0].read_text())
    steps = ({"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "NFC"})
    for index, step in enumerate(steps):
        path = tmp_path / str(index) / "tokenizer.json"
        path.parent.mkdir()
        path.write_text(json.dumps(definition | {"normalizer": step}))
        assert load_tokenizer(path).fewest_tokens(" " * 1000) == 0
    assert bpe.fewest_tokens(" " * 1000) > 0


def test_a_sentencepiece_that_drops_spaces_counts_what_is_left(tmp_path: Path) -> None:
    path = tiny_sentencepiece(tmp_path, remove_extra_whitespaces=True)
    tokenizer = load_tokenizer(path)
    text = "a" + " " * 1000 + "b"
    assert 1 <= tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text)) < 10
