"""The files beside a vocabulary are believed where they make sense, and refused in one line where they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama2.text.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from tests.support.tokenizer_json import llama_tokenizer_json


def _with_config(source: Tokenizer, folder: Path, config: Any, *, template: str | None = None) -> Tokenizer:
    file = folder / source.files[0].name
    file.write_bytes(source.files[0].read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return load_tokenizer(folder)


def test_the_config_names_bos_and_eos_and_says_whether_bos_is_added(bpe: Tokenizer, tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<|endoftext|>", "special": True}, "eos_token": "<|im_end|>"}
    tokenizer = _with_config(bpe, tmp_path, config | {"add_bos_token": True})
    assert tokenizer.encode_prompt("Hello") == [0, *bpe.encode("Hello")]
    assert tokenizer.template_variables == {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    assert _with_config(bpe, tmp_path, config).encode_prompt("Hello") == bpe.encode("Hello")


def test_the_chat_template_is_read_wherever_it_is(sp: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    assert _with_config(bpe, tmp_path, {}).chat_template is None
    assert _with_config(bpe, tmp_path, {"chat_template": "C"}).chat_template == "C"
    assert _with_config(bpe, tmp_path, {"chat_template": named}).chat_template == "B"
    assert _with_config(sp, tmp_path, {"chat_template": "C"}).chat_template == "C"
    tokenizer = _with_config(sp, tmp_path, {}, template="D")
    assert tokenizer.chat_template == "D"
    assert [file.name for file in tokenizer.files] == [
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_a_template_in_a_json_file_counts_more_than_the_configs(bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "E"}))
    tokenizer = _with_config(bpe, tmp_path, {"chat_template": "C"})
    assert tokenizer.chat_template == "E"
    assert tmp_path / "chat_template.json" in tokenizer.files
    assert _with_config(bpe, tmp_path, {}, template="D").chat_template == "D"


@pytest.mark.parametrize(("given", "ends"), [(5, {2, 5}), ([5, 7, 2], {2, 5, 7}), ([], {2}), (None, {2})])
def test_a_generation_config_names_more_ids_that_end_a_text(
    sp: Tokenizer, tmp_path: Path, given: Any, ends: set[int]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given, "temperature": 0.6}))
    tokenizer = _with_config(sp, tmp_path, {})
    assert tokenizer.eos_ids == ends
    assert tmp_path / "generation_config.json" in tokenizer.files, "a converted folder must have it, too"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("</s>", "eos_token_id must be an id or a list of ids, got ['</s>']"),
        ([2, -1], "eos_token_id must be an id or a list of ids, got [2, -1]"),
        ([2, 512], "eos_token_id must be below 512, the number of ids in tokenizer.model, got 512"),
    ],
)
def test_a_generation_config_that_names_no_ids_is_refused(
    sp: Tokenizer, tmp_path: Path, given: Any, problem: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    with pytest.raises(ValueError, match=re.escape(problem)):
        _with_config(sp, tmp_path, {})


def test_of_two_vocabularies_the_one_with_added_tokens_is_read_else_sentencepieces(
    sp: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sp.files[0].read_bytes())
    path = llama_tokenizer_json(tmp_path, sp.files[0], legacy=True)
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    content = json.loads(path.read_text())
    content["added_tokens"].append(content["added_tokens"][1] | {"id": 512, "content": "<|im_end|>"})
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special_tokens["<|im_end|>"] == 512
    assert 512 in tokenizer.eos_ids


def test_added_tokens_without_a_whole_vocabulary_are_refused(sp: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "added_tokens.json").write_text(json.dumps({"</s>": 2}))
    assert _with_config(sp, tmp_path, {"bos_token": ""}).bos_id == 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 512}))
    with pytest.raises(ValueError, match=r"lacks tokens of added_tokens\.json: expected a tokenizer\.json beside it"):
        _with_config(sp, tmp_path, {})


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
BPE = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [], "decoder": BYTE_LEVEL}


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.model", b"\x00\xff" * 500, "not a SentencePiece model"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "not a SentencePiece model"),
        ("tokenizer.json", b"", "not a JSON file"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read as text"),
        ("tokenizer.json", b"[" * 100_000, "not a JSON file"),
        ("tokenizer.json", b"[]", "must hold a JSON object"),
        ("tokenizer.json", b"{}", "with a BPE model"),
        ("tokenizer.json", BPE | {"decoder": {"type": "WordPiece"}}, "decoder WordPiece is not supported"),
        ("tokenizer.json", BPE | {"decoder": None}, "with a BPE model"),
        ("tokenizer.json", BPE | {"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "with a BPE model"),
        ("tokenizer.json", BPE | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}}, "library reads"),
        (
            "tokenizer.json",
            BPE | {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}},
            "without wide gaps",
        ),
        ("tokenizer.json", BPE | {"model": {"type": "BPE", "vocab": {}, "merges": []}}, "without wide gaps"),
        ("tokenizer.json", BPE | {"pre_tokenizer": 5}, "library reads"),
        ("tokenizer.txt", b"a b c", "of no known kind"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes | dict[str, Any], problem: str
) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=problem) as caught:
        load_tokenizer(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"eos_token": "<|im_end|>"}, "no special token '<|im_end|>', which tokenizer_config.json calls its eos_token"),
        ({"chat_template": 5}, "chat_template must be a string, got int"),
        ([], "must hold a JSON object, got list"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(sp: Tokenizer, tmp_path: Path, config: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        _with_config(sp, tmp_path, config)


def test_a_missing_tokenizer_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer: expected tokenizer\.model or tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer .*nothing\.model does not exist: expected a tokenizer\.model or"):
        load_tokenizer(tmp_path / "nothing.model")
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=r"tokenizer .*tokenizer\.model does not exist: there is a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.model")
