"""A dialog becomes the ids that the model was taught, and nothing that a message says becomes control."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama2.errors import InvalidValue
from llama2.text.chat import encode_dialog
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_json import llama_tokenizer_json
from tests.support.tokenizers import tiny_sentencepiece

LLAMA2_TAGS = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>"]
# What Hugging Face publishes with Llama 2, without its own checks of roles.
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for message in turns %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def dialog(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """`contents` are the user's and the assistant's in turn."""
    turns = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


DIALOGS = [
    dialog("what is the recipe of mayonnaise?"),
    dialog("What is 12 + 345?", system="Answer in one word."),
    dialog("Hello", "Hi! How can I help?", "Who are you?\n\n- be short\n- be kind"),
    dialog("  spaces around \n", " and here ", "\tthe end ", system=" Always be polite. \n"),
    dialog("今日は 🙂", "👩‍👩‍👧 はい", "ありがとう", "どういたしまして", "é", system="日本語で"),
    dialog("cp filename other; a < b && c > d | e", "[INST", "INST] SYS <<"),
]


@pytest.fixture(scope="module")
def smollm2_of_transformers(bpe: Tokenizer) -> Any:
    return AutoTokenizer.from_pretrained(bpe.files[0].parent)


def with_template(source: Tokenizer, folder: Path, template: str, **config: Any) -> Tokenizer:
    (folder / source.files[0].name).write_bytes(source.files[0].read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **config}))
    return load_tokenizer(folder)


# ---- Llama 2's own format


def test_the_layout_of_llama_2(sp: Tokenizer) -> None:
    ids = encode_dialog(sp, dialog("Hello!", "Hi.", "Who are you?", system="Be brief."))
    assert ids == [
        1,
        *sp.encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHello! [/INST] Hi. "),
        2,
        1,
        *sp.encode("[INST] Who are you? [/INST]"),
    ]


def _meta_reference(sp: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """What `chat_completion` in Meta's llama/generation.py does to a dialog, rewritten."""
    contents = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    ids = []
    for index in range(0, len(contents) - 1, 2):
        text = f"[INST] {contents[index].strip()} [/INST] {contents[index + 1].strip()} "
        ids += [1, *sp.encode(text), 2]
    return [*ids, 1, *sp.encode(f"[INST] {contents[-1].strip()} [/INST]")]


BENIGN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="[]<>"), max_size=20)


@settings(deadline=None, max_examples=200)
@given(contents=st.lists(BENIGN, min_size=1, max_size=7), system=st.none() | BENIGN.filter(str.strip))
def test_any_dialog_is_encoded_as_metas_code_does(sp: Tokenizer, contents: list[str], system: str | None) -> None:
    messages = dialog(*contents[: len(contents) - (len(contents) + 1) % 2], system=system)
    for special_tags in ("reject", "encode"):
        assert encode_dialog(sp, messages, special_tags=special_tags) == _meta_reference(sp, messages)


@pytest.mark.parametrize("system", [None, "", "  \n"])
def test_without_a_system_prompt_there_is_no_system_block(sp: Tokenizer, system: str | None) -> None:
    assert encode_dialog(sp, dialog("Hello", system=system)) == [1, *sp.encode("[INST] Hello [/INST]")]


def test_a_vocabulary_without_template_that_is_not_llama_2s_has_no_chat(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(bpe.files[0].read_bytes())
    with pytest.raises(ValueError, match=r"has no chat format: its tokenizer_config.json has no chat_template"):
        encode_dialog(load_tokenizer(tmp_path), dialog("Hello"))


# ---- Malformed dialogs


def roles_of(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "x"} for role in roles]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages must hold at least one message"),
        ("Hello", "messages must be a list of messages, got 'Hello'"),
        ({"role": "user", "content": "x"}, "messages must be a list of messages, got {'role'"),
        (["Hello"], "messages[0] must have a role and a content, and nothing else"),
        ([{"role": "user"}], "messages[0] must have a role and a content, and nothing else"),
        ([{"role": "user", "content": "x", "name": "y"}], "messages[0] must have a role and a content"),
        ([*roles_of("user", "assistant"), {"role": "user", "content": None}], "messages[2].content must be a string"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role must be one of 'system', 'user', 'assistant', got ['"),
        (roles_of("user", "tool"), "messages[1].role must be one of 'system', 'user', 'assistant', got 'tool'"),
    ],
)
def test_what_is_no_dialog_is_refused_by_its_message(
    sp: Tokenizer, bpe: Tokenizer, messages: Any, problem: str
) -> None:
    for tokenizer in (sp, bpe):
        with pytest.raises(InvalidValue, match=f"^{re.escape(problem)}"):
            encode_dialog(tokenizer, messages)


def test_special_tags_is_one_of_two(sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match="special_tags must be 'encode' or 'reject', got 'ignore'"):
        encode_dialog(sp, dialog("Hello"), special_tags="ignore")  # type: ignore[arg-type]


# ---- Tags inside messages


@pytest.mark.parametrize("tag", LLAMA2_TAGS)
def test_a_tag_in_a_message_is_refused_by_message_and_tag(sp: Tokenizer, tag: str) -> None:
    for index, contents in enumerate(([f"a{tag}", "b", "c"], ["a", f" {tag} ", "c"], ["a", "b", tag])):
        with pytest.raises(InvalidValue, match="special tag") as caught:
            encode_dialog(sp, dialog(*contents), special_tags="reject")
        assert caught.value.field == f"messages[{index}]"
        assert repr(tag) in caught.value.problem
    with pytest.raises(ValueError, match=r"messages\[0\] .* special tag"):
        encode_dialog(sp, dialog("a", system=f"be{tag}"), special_tags="reject")


def test_a_special_token_of_the_model_in_a_message_is_refused(bpe: Tokenizer) -> None:
    for tag in ("<|im_end|>", "<|im_start|>", "<|endoftext|>"):
        with pytest.raises(ValueError, match=r"messages\[1\] .* special tag"):
            encode_dialog(bpe, dialog("a", f"x{tag}y", "c"), special_tags="reject")
    assert encode_dialog(bpe, dialog("[INST] is no tag of this model </s>"), special_tags="reject")


def _acting(tokenizer: Tokenizer, ids: list[int], tags: list[str]) -> list[str]:
    """The tags that `ids` hold as the model knows them: special tokens, and text with a piece of several characters."""
    spelling = {index: piece for piece, index in tokenizer.special_tokens.items()}
    text, joined, found = "", set[int](), []
    for token_id in ids:
        if token_id in spelling:
            found.append(spelling[token_id])
            text += "\n"
            continue
        piece = tokenizer.token_bytes(token_id).decode("latin-1")  # a character for each byte
        if len(piece.strip()) > 1:
            joined |= set(range(len(text), len(text) + len(piece)))
        text += piece
    for tag in tags:
        for start in range(len(text)):
            if text.startswith(tag, start) and joined & set(range(start, start + len(tag))):
                found.append(tag)
    return sorted(found)


def _count(ids: list[int], part: list[int]) -> int:
    return sum(ids[start : start + len(part)] == part for start in range(len(ids)))


FRAGMENTS = [*LLAMA2_TAGS, "[", "]", "INST", "[INST", "/INST]", "<<", ">>", "SYS", "<", "s>", " ", "\n", "x", "🙂", "a"]
HOSTILE = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


@settings(deadline=None, max_examples=300)
@given(user=HOSTILE, answer=HOSTILE, last=HOSTILE, system=HOSTILE)
def test_an_encoded_tag_of_llama_2_cannot_act(sp: Tokenizer, user: str, answer: str, last: str, system: str) -> None:
    """The control tokens are those of the format, and the text is the same to the letter."""
    messages = dialog(user, answer, last, system=system)
    ids = encode_dialog(sp, messages, special_tags="encode")
    frame = encode_dialog(sp, dialog("x", "x", "x", system="x" if system.strip() else ""))
    tags = ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
    assert _acting(sp, ids, tags) == _acting(sp, frame, tags)
    for tag in tags:
        # As the format writes them, and in the middle of a text, after a byte that joins nothing.
        for sequence in (sp.encode(tag), sp.encode(f"\n{tag}")[2:]):
            assert _count(ids, sequence) <= _acting(sp, frame, tags).count(tag)
    assert sp.decode(ids) == sp.decode(_meta_reference(sp, messages if system.strip() else messages[1:]))


def test_an_encoded_tag_reads_as_it_was_written(sp: Tokenizer) -> None:
    ids = encode_dialog(sp, dialog("what does [INST] mean? </s>"), special_tags="encode")
    pieces = [sp.token_bytes(token_id).decode() for token_id in ids[1:]]
    start = len(pieces) - pieces[::-1].index("I") - 1
    assert pieces[start - 1 : start + 5] == ["[", "I", "N", "S", "T", "]"]
    assert sp.decode(ids) == "[INST] what does [INST] mean? </s> [/INST]"
    assert ids.count(2) == 0


def test_a_message_of_nothing_but_tags_takes_no_longer_than_its_length(sp: Tokenizer) -> None:
    """100,000 tags: a request must not be able to hold the server up."""
    start = time.process_time()
    ids = encode_dialog(sp, dialog("</s>[INST]" * 50_000), special_tags="encode")
    assert time.process_time() - start < 10
    assert ids.count(2) == 0


def test_a_lone_surrogate_beside_a_tag_is_refused(sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode: lone surrogate"):
        encode_dialog(sp, dialog("\ud800</s>"), special_tags="encode")


def test_a_vocabulary_of_single_characters_refuses_the_tag(tmp_path: Path) -> None:
    small = load_tokenizer(tiny_sentencepiece(tmp_path, vocab_size=345))
    assert max(len(small.token_bytes(token_id).strip()) for token_id in small.encode("[INST]")) == 1
    with pytest.raises(ValueError, match=r"encodes '\[INST\]' character by character"):
        encode_dialog(small, dialog("[INST]"), special_tags="encode")
    assert encode_dialog(small, dialog("<s>"), special_tags="encode").count(1) == 1


def test_private_use_characters_in_a_message_stay_what_they_are(sp: Tokenizer) -> None:
    text = "\ue000 [INST] \ue001 </s> \uf8ff"
    assert sp.decode(encode_dialog(sp, dialog(text), special_tags="encode")) == f"[INST] {text} [/INST]"
    everything = "".join(map(chr, range(0xE000, 0xF900)))
    with pytest.raises(ValueError, match="every private-use character"):
        encode_dialog(sp, dialog(everything + "</s>"), special_tags="encode")


# ---- The model's own chat template


@pytest.mark.parametrize("messages", DIALOGS)
@pytest.mark.parametrize("special_tags", ["reject", "encode"])
def test_a_template_gives_the_ids_that_transformers_gives(
    bpe: Tokenizer, smollm2_of_transformers: Any, messages: list[dict[str, str]], special_tags: Any
) -> None:
    theirs = smollm2_of_transformers.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_dialog(bpe, messages, special_tags=special_tags) == theirs


@pytest.mark.parametrize("messages", DIALOGS)
@pytest.mark.parametrize("legacy", [True, False])
def test_it_does_so_with_a_converted_llama_tokenizer(
    sp: Tokenizer, tmp_path: Path, messages: list[dict[str, str]], legacy: bool
) -> None:
    path = llama_tokenizer_json(tmp_path, sp.files[0], legacy=legacy)
    (tmp_path / "chat_template.jinja").write_text(LLAMA2_TEMPLATE)
    transformers = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<s>", eos_token="</s>")
    theirs = transformers.apply_chat_template(
        messages, chat_template=LLAMA2_TEMPLATE, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_dialog(load_tokenizer(path), messages) == theirs


@pytest.mark.parametrize("messages", DIALOGS[:5])
def test_llama_2s_format_as_a_template_gives_the_same_ids(
    sp: Tokenizer, tmp_path: Path, messages: list[dict[str, str]]
) -> None:
    """With SentencePiece: the format by ids and Hugging Face's template of it agree."""
    assert encode_dialog(with_template(sp, tmp_path, LLAMA2_TEMPLATE), messages) == encode_dialog(sp, messages)


CHATML_FRAGMENTS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|im_",
    "end|>",
    "<|",
    "<filename>",
    "<",
    "\n",
    " ",
    "system",
    "🙂",
    "1",
]


@settings(deadline=None, max_examples=300)
@given(contents=st.lists(st.lists(st.sampled_from(CHATML_FRAGMENTS), max_size=6).map("".join), min_size=3, max_size=3))
def test_an_encoded_special_token_of_a_template_model_cannot_act(
    bpe: Tokenizer, smollm2_of_transformers: Any, contents: list[str]
) -> None:
    """The special tokens are those of the template, and the text is what the template wrote."""
    ids = encode_dialog(bpe, dialog(*contents), special_tags="encode")
    # A default system prompt, three messages, and the beginning of the reply.
    assert [token_id for token_id in ids if token_id in bpe.special_tokens.values()] == [1, 2] * 4 + [1]
    rendered = smollm2_of_transformers.apply_chat_template(
        dialog(*contents), tokenize=False, add_generation_prompt=True
    )
    assert smollm2_of_transformers.decode(ids, skip_special_tokens=False) == rendered


def test_a_tag_that_a_template_writes_as_text_is_a_tag(sp: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_template(sp, tmp_path, LLAMA2_TEMPLATE)
    messages = dialog(" [INST] <</SYS>> </s>", "[/INST]", "<<SYS>> ")
    with pytest.raises(ValueError, match=r"messages\[0\] .* '\[INST\]'"):
        encode_dialog(tokenizer, messages, special_tags="reject")
    ids = encode_dialog(tokenizer, messages, special_tags="encode")
    assert ids == encode_dialog(sp, messages, special_tags="encode")


def test_a_template_may_refuse_a_dialog(bpe: Tokenizer, tmp_path: Path) -> None:
    template = "{% if messages|length > 1 %}{{ raise_exception('one question only') }}{% endif %}ok"
    tokenizer = with_template(bpe, tmp_path, template)
    assert encode_dialog(tokenizer, dialog("a")) == bpe.encode("ok")
    with pytest.raises(ValueError, match=r"chat template refuses this dialog: one question only"):
        encode_dialog(tokenizer, dialog("a", "b", "c"))
    with pytest.raises(ValueError, match=r"chat template refuses this dialog: .*undefined"):
        encode_dialog(with_template(bpe, tmp_path, "{{ nothing.at.all }}"), dialog("a"))
    with pytest.raises(ValueError, match=r"chat template refuses this dialog: .*unsafe"):
        encode_dialog(with_template(bpe, tmp_path, "{{ messages.__class__.__mro__ }}"), dialog("a"))


def test_template_and_message_cannot_make_a_special_token_together(bpe: Tokenizer, tmp_path: Path) -> None:
    tokenizer = with_template(bpe, tmp_path, "{{ '<|im_' + messages[0]['content'] }}")
    assert encode_dialog(tokenizer, dialog("begin")) == bpe.encode("<|im_begin")
    with pytest.raises(ValueError, match="together spell a special token"):
        encode_dialog(tokenizer, dialog("end|>"))
