"""Text to ids and back agrees with the libraries that own the formats, and text never becomes a special token."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llama2.text.tokenizer import BpeTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from tests.support.tokenizer_json import llama_tokenizer_json, smollm2_tokenizer
from tests.support.tokenizers import tiny_sentencepiece

TEXTS = [
    "",
    "The capital of France is Paris.",
    " leading space",
    "   three leading spaces",
    "runs  of   spaces    and trailing  ",
    "new\nlines\n\n\nand\ttabs\r\n",
    "numbers 1234567890 3.14",
    "今日は天気がいいですね 한국어 русский",
    "emoji 🙂👩‍👩‍👧🏳️‍🌈 and é (combining)",
    "nul \0 and \x7f",
    "[INST] <s> </s> <unk> <|im_start|>user<|im_end|><|endoftext|>",
    " ",
    "\n",
]
SPELLINGS = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<filename>", "<|", "|>", "s>", "<"]
# Without what the vocabularies cannot write: SmolLM2's has no bytes for some control and unassigned characters, and
# "▁" is a space to SentencePiece.
ANY_TEXT = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc", "Cn", "Co"],
        include_characters="\n\t\r",
        exclude_characters="\N{LOWER ONE EIGHTH BLOCK}",
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def sp(folder: Path) -> Tokenizer:
    (folder / "sp").mkdir()
    return load_tokenizer(tiny_sentencepiece(folder / "sp"))


@pytest.fixture(scope="module")
def processor(sp: Tokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(sp.files[0]))


@pytest.fixture(scope="module")
def bpe(folder: Path) -> Tokenizer:
    (folder / "bpe").mkdir()
    return load_tokenizer(smollm2_tokenizer(folder / "bpe"))


@pytest.fixture(scope="module")
def library(bpe: Tokenizer) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(bpe.files[0]))


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "first word only"])
def converted(request: pytest.FixtureRequest, folder: Path, sp: Tokenizer) -> Tokenizer:
    path = folder / f"converted-{request.param}"
    return load_tokenizer(llama_tokenizer_json(path, sp.files[0], legacy=request.param))


def test_sentencepiece_encodes_as_the_library_does(
    sp: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    for text in TEXTS:
        assert sp.encode(text) == processor.encode(text)
        assert sp.encode_prompt(text) == [1, *processor.encode(text)]


def test_sentencepiece_decodes_as_the_library_does(
    sp: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    for text in TEXTS:
        assert sp.decode(sp.encode_prompt(text)) == processor.decode(processor.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 511) | st.integers(3, 258), max_size=12), bos=st.booleans())
def test_any_ids_decode_as_sentencepiece_decodes_them(
    sp: Tokenizer, processor: sentencepiece.SentencePieceProcessor, ids: list[int], bos: bool
) -> None:
    """Broken UTF-8 too. Control tokens are left out: SentencePiece lets them break a character in two."""
    ids = [token_id for token_id in ids if token_id not in (1, 2)]
    assert sp.decode([1] * bos + ids) == processor.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=ANY_TEXT)
def test_the_bytes_of_the_tokens_are_the_text(sp: Tokenizer, bpe: Tokenizer, text: str) -> None:
    for tokenizer, mark in ((sp, " " if text else ""), (bpe, "")):
        ids = tokenizer.encode(text)
        assert b"".join(map(tokenizer.token_bytes, ids)) == (mark + text).encode()
        assert tokenizer.decode(ids) == text


def test_special_tokens_of_a_sentencepiece_model(sp: Tokenizer) -> None:
    assert isinstance(sp, SentencePieceTokenizer)
    assert (sp.vocab_size, sp.bos_id, sp.eos_id, sp.eos_ids) == (512, 1, 2, {2})
    assert sp.special_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (sp.special_tokens.get("<s>"), sp.special_tokens.get("[INST]"), sp.chat_template) == (1, None, None)
    assert sp.files == (sp.files[0],)


def test_ids_outside_the_vocabulary_and_special_tokens_have_no_bytes(sp: Tokenizer, bpe: Tokenizer) -> None:
    for token_id in (1, 2, 512, 10**9, -1):
        assert sp.token_bytes(token_id) == b""
    for token_id in (0, 1, 2, 16, 49152, -1):
        assert bpe.token_bytes(token_id) == b""


def test_byte_level_bpe_encodes_as_the_tokenizers_library_and_transformers_do(
    bpe: Tokenizer, library: tokenizers.Tokenizer
) -> None:
    transformers = PreTrainedTokenizerFast(tokenizer_file=str(bpe.files[0]))
    for text in TEXTS:
        harmless = text.replace("<|", "< |")  # these two would read special tokens
        assert bpe.encode(harmless) == library.encode(harmless).ids == transformers.encode(harmless)


@settings(deadline=None, max_examples=200)
@given(ids=st.lists(st.integers(0, 49151) | st.integers(17, 400), max_size=12))
def test_any_ids_decode_as_the_tokenizers_library_decodes_them(
    bpe: Tokenizer, library: tokenizers.Tokenizer, ids: list[int]
) -> None:
    assert bpe.decode(ids) == library.decode(ids, skip_special_tokens=True)


def test_special_tokens_of_the_demo_model(bpe: Tokenizer) -> None:
    assert isinstance(bpe, BpeTokenizer)
    assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.eos_ids) == (49152, 1, 2, {0, 2})
    assert bpe.special_tokens["<|im_end|>"] == 2
    assert len(bpe.special_tokens) == 17
    assert bpe.encode_prompt("Hello") == bpe.encode("Hello"), "SmolLM2 was trained without BOS"
    assert bpe.chat_template is not None
    assert bpe.template_variables["eos_token"] == "<|im_end|>"
    assert [file.name for file in bpe.files] == ["tokenizer.json", "tokenizer_config.json"]


@settings(deadline=None, max_examples=200)
@given(parts=st.lists(st.sampled_from(SPELLINGS) | ANY_TEXT, max_size=6))
def test_text_never_becomes_a_special_token(sp: Tokenizer, bpe: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in (sp, bpe):
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=100)
@given(text=ANY_TEXT | st.sampled_from(SPELLINGS))
def test_spelling_out_gives_the_same_text_in_single_characters(sp: Tokenizer, bpe: Tokenizer, text: str) -> None:
    for tokenizer in (sp, bpe):
        pieces = [tokenizer.token_bytes(token_id) for token_id in tokenizer.spell(text.encode())]
        assert b"".join(pieces) == text.encode()
        assert all(len(piece) == 1 or len(piece.decode()) == 1 for piece in pieces)


def test_a_converted_llama_tokenizer_encodes_as_transformers_does(converted: Tokenizer) -> None:
    transformers = PreTrainedTokenizerFast(tokenizer_file=str(converted.files[0]))
    for text in TEXTS:
        harmless = text.replace("<", "< ")
        assert converted.encode(harmless) == transformers.encode(harmless, add_special_tokens=False)
        # After a special token, as in a rendered chat.
        assert [1, *converted.encode(harmless, after_special=True)] == transformers.encode(f"<s>{harmless}")


def test_a_converted_llama_tokenizer_decodes_as_the_tokenizers_library_does(converted: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(converted.files[0]))
    for text in TEXTS:
        ids = converted.encode(text)
        assert not set(ids) & {0, 1, 2}
        assert converted.decode([1, *ids, 2]) == library.decode(ids)


def test_special_tokens_are_found_in_what_a_template_wrote(bpe: Tokenizer, sp: Tokenizer) -> None:
    assert bpe.split_special("<|im_start|>user\nhi<|im_end|>\n") == [1, "user\nhi", 2, "\n"]
    assert sp.split_special("<s>[INST] a [/INST]</s></s>") == [1, "[INST] a [/INST]", 2, 2]
    assert sp.split_special("") == []


def test_a_special_token_swallows_the_white_space_that_its_flags_name(bpe: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(bpe.files[0].read_text())
    definition["added_tokens"][1] |= {"lstrip": True, "rstrip": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "one \n <|im_start|>  two <|im_end|> three"
    tokenizer = load_tokenizer(tmp_path)
    runs = tokenizer.split_special(text)
    assert runs == ["one", 1, "two ", 2, " three"]
    ids = [token for run in runs for token in ([run] if isinstance(run, int) else tokenizer.encode(run))]
    assert ids == library.encode(text).ids


def test_the_longest_of_several_special_tokens_is_found(bpe: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(bpe.files[0].read_text())
    definition["added_tokens"].append(definition["added_tokens"][1] | {"id": 49152, "content": "<|im_start|>user"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    text = "<|im_start|>user<|im_start|>use"
    assert tokenizer.split_special(text) == [49152, 1, "use"]
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(text).ids == [49152, 1, *tokenizer.encode("use")]


def test_an_added_token_that_is_not_special_is_text(bpe: Tokenizer, tmp_path: Path) -> None:
    """Its content is text even where it looks like a byte-level piece; the tokenizers library loses this accent."""
    definition = json.loads(bpe.files[0].read_text())
    flags = {"special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    definition["added_tokens"].append(flags | {"id": 49152, "content": "<café>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("un <café>?")
    assert 49152 in ids
    assert tokenizer.decode(ids) == "un <café>?"
    assert tokenizer.vocab_size == 49153


def test_a_merge_that_spells_a_special_token_makes_none(converted: Tokenizer, tmp_path: Path) -> None:
    """A vocabulary with "<" + "s>" among its merges, in both notations, as a careless conversion writes it."""
    for notation in ({"merges": [["s", ">"], ["<", "s>"]]}, {"merges": ["s >", "< s>"]}):
        definition = json.loads(converted.files[0].read_text())
        definition["model"]["vocab"] |= {"s>": 512}
        definition["model"] |= notation
        (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
        tokenizer = load_tokenizer(tmp_path)
        assert 1 not in tokenizer.encode("<s>")
        assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"


def test_a_tokenizer_json_that_says_to_truncate_and_pad_does_neither(bpe: Tokenizer, tmp_path: Path) -> None:
    definition = json.loads(bpe.files[0].read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    assert load_tokenizer(tmp_path).encode(TEXTS[1]) == bpe.encode(TEXTS[1])


def test_bos_that_the_post_processor_adds_is_added(sp: Tokenizer, converted: Tokenizer, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(converted.files[0]))
    library.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("Hello") == library.encode("Hello").ids == [1, *tokenizer.encode("Hello")]


def test_a_folder_with_both_kinds_is_read_by_its_sentencepiece_model(sp: Tokenizer, converted: Tokenizer) -> None:
    folder = converted.files[0].parent
    (folder / "tokenizer.model").write_bytes(sp.files[0].read_bytes())
    assert isinstance(load_tokenizer(folder), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(folder / "tokenizer.json"), BpeTokenizer)


def test_a_lone_surrogate_is_refused_by_its_place(sp: Tokenizer, bpe: Tokenizer) -> None:
    for tokenizer in (sp, bpe):
        with pytest.raises(ValueError, match="lone surrogate at character 2") as caught:
            tokenizer.encode_prompt("ab\ud800")
        assert type(caught.value) is ValueError


@pytest.mark.integration
def test_the_tokenizer_and_the_chat_need_no_torch(bpe: Tokenizer) -> None:
    """Not even when a template is rendered: a front that only encodes must start fast."""
    code = (
        "import sys; from llama2.text.tokenizer import load_tokenizer; from llama2.text.chat import encode_dialog\n"
        "assert 'transformers' not in sys.modules\n"
        "encode_dialog(load_tokenizer(sys.argv[1]), [{'role': 'user', 'content': 'hi'}])\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code, str(bpe.files[0])], cwd=root, check=True)


def test_a_long_text_lets_other_threads_run(bpe: Tokenizer) -> None:
    """Encoding one megabyte takes hundreds of milliseconds; an engine's thread must not wait for that."""
    text = "The quick brown fox. " * 50_000
    longest, ended = 0.0, threading.Event()

    def look() -> None:
        nonlocal longest
        last = time.perf_counter()
        while not ended.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            longest, last = max(longest, now - last), now

    thread = threading.Thread(target=look)
    thread.start()
    begin = time.perf_counter()
    bpe.encode(text)
    seconds = time.perf_counter() - begin
    ended.set()
    thread.join()
    assert longest < seconds / 2
