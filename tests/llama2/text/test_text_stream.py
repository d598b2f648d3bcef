"""Text that grows token by token is, in the end, the text of all tokens, and never shows what must not be seen."""

from __future__ import annotations

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.text.text_stream import TextStream
from llama2.text.tokenizer import Tokenizer

UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def _stream(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), *, continues_prompt: bool = False
) -> tuple[list[str], TextStream]:
    """What every push showed and, last, what finish showed."""
    stream = TextStream(tokenizer, stop=stop, continues_prompt=continues_prompt)
    return [*map(stream.push, ids), stream.finish()], stream


def _cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: the stop string that ends first wins, of those that end together the longest."""
    ends = [(text.index(string) + len(string), -len(string)) for string in stop if string in text]
    if not ends:
        return text, False
    end, negative_length = min(ends)
    return text[: end + negative_length], True


def _may_go_on(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that some stop string begins with."""
    return max((size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0)


# Few characters, so that stop strings are met and begun often. They take 1 to 4 bytes.
SMALL_ALPHABET = st.text("ab \né今🙂", max_size=24)
STOPS = st.lists(st.text("ab \né今🙂", min_size=1, max_size=5), max_size=4).map(tuple)


@settings(deadline=None, max_examples=500)
@given(text=SMALL_ALPHABET, stop=STOPS)
def test_the_stream_shows_the_text_up_to_the_stop_string(
    sp: Tokenizer, bpe: Tokenizer, text: str, stop: tuple[str, ...]
) -> None:
    for tokenizer in (sp, bpe):
        shown, stream = _stream(tokenizer, tokenizer.encode(text), stop)
        assert ("".join(shown), stream.stopped) == _cut(text, stop)
        assert UNFINISHED not in "".join(shown)


@settings(deadline=None, max_examples=500)
@given(ids=st.lists(st.integers(0, 511), max_size=24), stop=STOPS)
def test_any_ids_stream_to_what_they_decode_to(
    sp: Tokenizer, bpe: Tokenizer, ids: list[int], stop: tuple[str, ...]
) -> None:
    """Broken UTF-8 and special tokens too. What they decode to is compared with the libraries in test_tokenizer."""
    for tokenizer in (sp, bpe):
        shown, stream = _stream(tokenizer, ids, stop)
        assert ("".join(shown), stream.stopped) == _cut(tokenizer.decode(ids), stop)


@settings(deadline=None, max_examples=300)
@given(text=SMALL_ALPHABET, stop=STOPS)
def test_what_is_shown_at_every_moment_is_all_that_is_safe(
    sp: Tokenizer, bpe: Tokenizer, text: str, stop: tuple[str, ...]
) -> None:
    """No less: only an unfinished character and what may become a stop string are held back. And no more."""
    for tokenizer in (sp, bpe):
        stream = TextStream(tokenizer, stop=stop, continues_prompt=False)
        shown = ""
        data = b""
        for index, token_id in enumerate(tokenizer.encode(text)):
            data += tokenizer.token_bytes(token_id, first=index == 0)
            shown += stream.push(token_id)
            complete, stopped = _cut(data.decode(errors="ignore"), stop)
            held = 0 if stopped else _may_go_on(complete, stop)
            assert shown == complete[: len(complete) - held]


def test_an_emoji_of_byte_pieces_comes_out_whole_with_its_last_byte(sp: Tokenizer) -> None:
    ids = sp.encode("a🙂b")
    assert len(ids) > 4, "this vocabulary has no piece for it"
    shown, _ = _stream(sp, ids)
    assert [text for text in shown if text] == ["a", "🙂", "b"]


def test_an_unfinished_character_is_shown_as_such_only_at_the_end(sp: Tokenizer, bpe: Tokenizer) -> None:
    sp_ids = sp.encode("a🙂")[:-1]
    assert _stream(sp, sp_ids)[0][-1] == UNFINISHED * 3, "SentencePiece counts bytes"
    bpe_ids = bpe.spell("a🙂".encode())[:-1]
    assert "".join(_stream(bpe, bpe_ids)[0]) == "a" + UNFINISHED
    assert UNFINISHED not in "".join(_stream(bpe, bpe_ids)[0][:-1])


def test_a_stop_string_over_several_tokens_is_never_shown_in_part(bpe: Tokenizer) -> None:
    ids = bpe.spell(b"Yes. User: no User: why")
    shown, stream = _stream(bpe, ids, ("User:",))
    assert "".join(shown) == "Yes. "
    assert stream.stopped
    # "U" might begin it, " Use " does not.
    shown, stream = _stream(bpe, bpe.spell(b"U Use it"), ("User:",))
    assert "".join(shown[:-1]) == "U Use it"
    assert shown[:2] == ["", "U "]
    assert not stream.stopped


def test_a_begun_stop_string_is_shown_when_generation_ends(bpe: Tokenizer) -> None:
    shown, stream = _stream(bpe, bpe.spell(b"to be continued: Us"), ("User:",))
    assert shown[-1] == "Us"
    assert not stream.stopped


def test_a_stop_string_may_begin_inside_another_ones_beginning(bpe: Tokenizer) -> None:
    """The classic trap of a search that starts again from nothing after a mismatch."""
    for text, stop, expected in [
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("abcd", ("abcx", "bcd"), "a"),
        ("abcd", ("abcd", "bc"), "a"),
        ("abcd", ("cd", "bcd"), "a"),
        ("今日は🙂です", ("🙂で",), "今日は"),
    ]:
        shown, stream = _stream(bpe, bpe.spell(text.encode()), stop)
        assert ("".join(shown), stream.stopped) == (expected, True)


def test_nothing_is_shown_after_the_stop_string(bpe: Tokenizer) -> None:
    stream = TextStream(bpe, stop=(".",))
    assert "".join(map(stream.push, bpe.encode("One. Two."))) == "One"
    assert (stream.stopped, stream.push(bpe.encode(" Three")[0]), stream.finish()) == (True, "", "")


def test_the_space_before_the_first_word_stays_where_the_text_goes_on(sp: Tokenizer) -> None:
    """A completion continues its prompt; a chat reply is a text of its own, and loses one space only."""
    ids = sp.encode("there was")
    assert "".join(_stream(sp, ids, continues_prompt=True)[0]) == " there was"
    assert "".join(_stream(sp, ids)[0]) == "there was"
    assert "".join(_stream(sp, [1, *ids])[0]) == "there was", "a special token before it is no text"
    assert "".join(_stream(sp, [*sp.encode(""), *sp.encode("  there")])[0]) == "  there"


def test_special_tokens_are_not_shown(bpe: Tokenizer) -> None:
    assert "".join(_stream(bpe, [1, *bpe.encode("Hi"), 2, *bpe.encode(" you"), 0])[0]) == "Hi you"


def test_the_cost_of_a_token_does_not_grow(bpe: Tokenizer) -> None:
    """100,000 tokens, with a stop string that is begun at each of them and thousands of characters long."""
    token_id = bpe.encode("a")[0]
    stream = TextStream(bpe, stop=("a" * 5000 + "b", "ab"))
    start = time.process_time()
    length = sum(len(stream.push(token_id)) for _ in range(100_000))
    assert time.process_time() - start < 10
    assert length == 95_000
    assert len(stream.finish()) == 5000
