"""A tokenizer out of a GGUF file's metadata is the model's own: SentencePiece's, or the tokenizers library's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from llama2.text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from llama2.weights.convert import convert
from llama2.weights.readers.gguf.byte_level import WORDS
from llama2.weights.readers.gguf.file import GgufFile
from scripts.smollm2 import gguf_file
from tests.support.gguf_files import sentencepiece_vocabulary, small_bpe, write_gguf
from tests.support.tokenizers import SENTENCES, tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

TEXTS = [
    "",
    " ",
    "   three leading spaces",
    "runs  of   spaces    and trailing  ",
    "new\nlines\n\n\nand\ttabs\r\n",
    "numbers 1234567890 3.14 don't You'LL",
    "今日は天気がいいですね 한국어 русский Straße é (combining)",
    "emoji 🙂👩‍👩‍👧🏳️‍🌈 nul \0 and \x7f",
    "[INST] <s> </s> <unk> <0x41> <|im_start|>user<|im_end|> <pad>",
    "camelCase HTMLParser 'S 's x.y!!\n\n  z /// $+= ～。",
]
CHECK = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def tokenizer_of(folder: Path, write: Callable[[gguf.GGUFWriter], None], vocab_size: int) -> Tokenizer:
    """The one that a GGUF file with this metadata brings along."""
    args = tiny_args(n_layers=1, vocab_size=vocab_size)
    model = GgufFile(write_gguf(folder / "model.gguf", args, random_weights(args), tokenizer=write))
    (folder / "out").mkdir(exist_ok=True)
    model.write_tokenizer(folder / "out")
    return load_tokenizer(folder / "out")


@pytest.mark.parametrize("removes", [False, True])
def test_a_sentencepiece_model_comes_back(tmp_path: Path, removes: bool) -> None:
    """Ids, spellings, scores and named ids, and the ids of every text."""
    path = tiny_sentencepiece(tmp_path, remove_extra_whitespaces=removes)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))

    def write(writer: gguf.GGUFWriter) -> None:
        sentencepiece_vocabulary(writer, path)
        writer.add_remove_extra_whitespaces(removes)
        writer.add_chat_template(CHECK)

    ours = tokenizer_of(tmp_path, write, theirs.vocab_size())
    assert isinstance(ours, SentencePieceTokenizer)
    written = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    for index in range(theirs.vocab_size()):
        assert written.id_to_piece(index) == theirs.id_to_piece(index)
        assert written.get_score(index) == theirs.get_score(index)
    for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
        assert getattr(written, name)() == getattr(theirs, name)()
    original = load_tokenizer(path)
    assert (ours.bos_id, ours.eos_ids, ours.special_tokens) == (1, {2}, original.special_tokens)
    assert ours.chat_template == CHECK
    for text in [*TEXTS, *SENTENCES]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode_prompt(text) == original.encode_prompt(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=60))
    def any_text(text: str) -> None:
        assert written.encode(text) == theirs.encode(text)

    any_text()


def test_what_a_sentencepiece_vocabulary_may_say_besides(tmp_path: Path) -> None:
    """No space before the first word, no BOS, pieces that are always whole, tokens that never come of a text."""
    path = tiny_sentencepiece(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = theirs.vocab_size()

    def write(writer: gguf.GGUFWriter) -> None:
        sentencepiece_vocabulary(writer, path)
        extra = ["<tool call>", "<|im_end|>"]
        for key, values in (
            ("tokens", [*(theirs.id_to_piece(index) for index in range(size)), *extra]),
            ("scores", [*(theirs.get_score(index) for index in range(size)), -1000.0, -1000.0]),
            ("token_type", [*writer.kv_data[0]["tokenizer.ggml.token_type"].value, 4, 3]),
        ):
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value = values
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)
        writer.add_eot_token_id(1)

    ours = tokenizer_of(tmp_path, write, size + 2)
    assert ours.encode("a<tool call>b")[1] == size
    assert ours.decode([size]) == "<tool call>"
    assert size + 1 not in ours.encode("a<|im_end|>b")
    assert ours.eos_ids == {1, 2, size + 1}, "what ends a turn ends a reply"
    assert theirs.encode("the")[0] == theirs.piece_to_id("▁the")
    assert ours.encode("the")[0] != theirs.encode("the")[0]
    assert ours.decode(ours.encode("the king")) == "the king"
    assert ours.encode_prompt("a") == ours.encode("a")


def test_the_tokenizer_of_the_demo_model_is_the_one_that_transformers_builds(tmp_path: Path) -> None:
    GgufFile(gguf_file()).write_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    architecture, description, names = get_gguf_tokenizer(str(gguf_file()))
    theirs, _ = convert_gguf_tokenizer(architecture, description)
    for text in (
        "Hello, world!",
        "  two  spaces\n\nnew\tlines",
        "今日は 🙂",
        "don't You'll",
        "def f(x):\n    return x\n",
    ):
        assert ours.encode(text) == theirs.encode(text).ids
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert ours.template_variables[name] == names[name]
    assert ours.chat_template == names["chat_template"]


def test_transformers_reads_the_tokenizer_that_is_written(tmp_path: Path) -> None:
    GgufFile(gguf_file()).write_tokenizer(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert theirs.encode("The year is 2026.") == ours.encode_prompt("The year is 2026.")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False
    assert config["eos_token"] == "<|im_end|>"


# What each kind makes of one text: the words that it is cut into.
TEXT = "Don't 'LL HTMLParser 12345 x.y!!\n\n  z"
CUTS = {
    "default": "Don|'|t| |'|LL| HTMLParser| |123|45| x|.|y|!!|\n\n | z",
    "gpt-2": "Don|'t| '|LL| HTMLParser| 12345| x|.|y|!!|\n\n | z",
    "smollm": "Don|'t| '|LL| HTMLParser| |1|2|3|4|5| x|.|y|!!|\n\n | z",
    "llama-bpe": "Don|'t| '|LL| HTMLParser| |123|45| x|.y|!!\n\n| | z",
    "tekken": "Don|'t| '|LL| HTMLParser| |1|2|3|4|5| x|.y|!!\n\n| | z",
    "gpt-4o": "Don't| '|LL| HTMLParser| |123|45| x|.y|!!\n\n| | z",
    "qwen2": "Don|'t| '|LL| HTMLParser| |1|2|3|4|5| x|.y|!!\n\n| | z",
    "seed-coder": "Don|'t| '|LL| HTMLParser| |1|2|3|4|5| x|.y|!!|\n\n| | z",
    "deepseek-llm": "Don|'|t| '|LL| HTMLParser| |1|2|3|4|5| x|.|y|!!|\n|\n| | z",
    "deepseek-coder": "Don|'|t| '|LL| HTMLParser| |1|2|3|4|5| x|.|y|!!|\n|\n| | z",
    "viking": "Don't| 'LL| HTMLParser| |1|2|3|4|5| x|.|y|!!\n\n | z",
}


@pytest.mark.parametrize("name", WORDS)
def test_words_are_cut_as_each_kind_says(name: str) -> None:
    """No kind loses a character, and each cuts as its family does."""
    cut = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(each), "isolated") for each in WORDS[name].cuts])
    for text in [*TEXTS, *SENTENCES, TEXT]:
        assert "".join(word for word, _ in cut.pre_tokenize_str(text)) == text
    family = next(each for each in CUTS if WORDS[each].cuts == WORDS[name].cuts)
    assert "|".join(word for word, _ in cut.pre_tokenize_str(TEXT)) == CUTS[family]


@pytest.mark.parametrize(("words", "whole", "adds_bos"), [("gpt-2", False, False), ("llama-bpe", True, True)])
def test_a_byte_level_tokenizer_comes_back(tmp_path: Path, words: str, whole: bool, adds_bos: bool) -> None:
    """One that the tokenizers library has trained, from its pieces and merges alone."""
    (cut,) = WORDS[words].cuts
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=whole))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    theirs.train_from_iterator(
        SENTENCES,
        tokenizers.trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|bos|>", "<|eos|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    theirs.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "    "])
    vocabulary = theirs.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = json.loads(theirs.to_str())["model"]["merges"]

    def write(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words)
        writer.add_token_list(pieces)
        writer.add_token_types(
            [3 if index < 2 else 4 if index >= len(pieces) - 2 else 1 for index in range(len(pieces))]
        )
        writer.add_token_merges([" ".join(merge) for merge in merges])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    ours = tokenizer_of(tmp_path, write, len(pieces))
    theirs.encode_special_tokens = True
    for text in [*TEXTS, *SENTENCES, "<think>four    spaces"]:
        assert ours.encode(text) == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    # Where the file does not say whether a text begins with BOS, its kind does.
    assert ours.encode_prompt("a") == [0] * adds_bos + theirs.encode("a").ids
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a") == ours.encode_prompt("a")


def test_a_file_that_asks_for_bos_gets_it(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, small_bpe, 96)
    assert tokenizer.encode_prompt("abc") == [0, 95, tokenizer.encode("c")[0]]
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.chat_template) == (96, {1}, None)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("pre", "falcon", r"says that words are cut as 'falcon' \(tokenizer.ggml.pre\); known are default, .*tekken"),
        ("pre", None, r"does not say how words are cut \(tokenizer.ggml.pre\)"),
        ("model", "rwkv", "its tokenizer is 'rwkv', and only llama and gpt2 are known"),
        ("model", None, "its tokenizer is 'no_vocab'"),
    ],
)
def test_a_tokenizer_of_another_kind_is_refused_with_the_way_out(
    tmp_path: Path, key: str, value: str | None, problem: str
) -> None:
    args = tiny_args(n_layers=1, vocab_size=512)

    def write(writer: gguf.GGUFWriter) -> None:
        small_bpe(writer)
        if value is None:
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        else:
            writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value

    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), tokenizer=write)
    with pytest.raises(ValueError, match=problem) as caught:
        convert(path, tmp_path / "out")
    assert "--tokenizer_path" in str(caught.value)
    assert not (tmp_path / "out").exists()
    convert(path, tmp_path / "out", tokenizer_path=tiny_sentencepiece(tmp_path), verify=True)
    assert load_tokenizer(tmp_path / "out").vocab_size == 512
    with pytest.raises(ValueError, match="the tokenizer has 600 ids, but the model only 512"):
        convert(path, tmp_path / "other", tokenizer_path=tiny_sentencepiece(tmp_path, 600))


def test_more_pieces_than_the_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its tokenizer has 96 pieces, and its embedding has rows for 90"):
        tokenizer_of(tmp_path, small_bpe, 90)
    assert tokenizer_of(tmp_path, small_bpe, 100).vocab_size == 96


@pytest.mark.parametrize(("words", "pieces"), [("llama-bpe", [b"abc"]), ("tekken", [b"abc"]), ("gpt-2", [b"ab", b"c"])])
def test_a_word_that_is_a_piece_is_whole_where_its_kind_says_so(
    tmp_path: Path, words: str, pieces: list[bytes]
) -> None:
    """A piece that no merge makes."""

    def write(writer: gguf.GGUFWriter) -> None:
        small_bpe(writer, words=words)
        values = writer.kv_data[0]
        values["tokenizer.ggml.tokens"].value.append("abc")
        values["tokenizer.ggml.token_type"].value.append(gguf.TokenType.NORMAL)

    tokenizer = tokenizer_of(tmp_path, write, 97)
    assert [tokenizer.token_bytes(each) for each in tokenizer.encode("abc")] == pieces
