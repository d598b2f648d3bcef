"""The prompt inspector: what every token is, where it came from, and what looks wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama2.text.tokenizer import load_tokenizer
from tests.handler.openai.support import USER, Server, make_server
from tests.handler.support import byte_tokenizer
from tests.support.tokenizers import tiny_sentencepiece

CHAT, TEXT = "v1/chat/completions", "v1/completions"


def inspect(server: Server, path: str, **body: Any) -> dict[str, Any]:
    reply = server.get(path, dry_run=True, **body)
    assert (reply["object"], reply["model"]) == ("prompt.inspection", "smol")
    (prompt,) = reply["prompts"]
    return prompt


def runs(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The text of neighbours of the same role."""
    found: list[tuple[str, str]] = []
    for token in report["tokens"]:
        if found and found[-1][0] == token["role"] not in ("BOS", "EOS"):
            found[-1] = (token["role"], found[-1][1] + token["text"])
        else:
            found.append((token["role"], token["text"]))
    return found


def rules(report: dict[str, Any]) -> list[str]:
    return [finding["rule"] for finding in report["lint"]]


def test_a_dry_run_shows_what_the_engine_would_be_given(server: Server) -> None:
    report = inspect(server, CHAT, messages=[USER])
    assert report["ids"] == list(server.request(CHAT, messages=[USER]).prompt_ids)
    assert [token["id"] for token in report["tokens"]] == report["ids"]
    assert report["num_tokens"] == len(report["ids"])
    assert (report["truncated"], report["lint"]) == (None, [])


def test_every_token_of_a_chat_has_a_role(server: Server) -> None:
    """Even where a message says what the template says around it."""
    messages = [
        {"role": "system", "content": "system"},
        {"role": "user", "content": "user"},
        {"role": "assistant", "content": "user\n"},
        {"role": "user", "content": "assistant"},
    ]
    assert runs(inspect(server, CHAT, messages=messages)) == [
        *(("tag", "<|im_start|>"), ("template", "system\n"), ("system", "system"), ("EOS", "<|im_end|>")),
        *(("template", "\n"), ("tag", "<|im_start|>"), ("template", "user\n"), ("user", "user"), ("EOS", "<|im_end|>")),
        *(("template", "\n"), ("tag", "<|im_start|>"), ("template", "assistant\n"), ("assistant", "user\n")),
        *(("EOS", "<|im_end|>"), ("template", "\n"), ("tag", "<|im_start|>"), ("template", "user\n")),
        *(("user", "assistant"), ("EOS", "<|im_end|>"), ("template", "\n"), ("tag", "<|im_start|>")),
        ("template", "assistant\n"),
    ]


def test_the_tags_of_llama_2_are_told_from_the_words_between_them(tmp_path: Path) -> None:
    server = make_server(tmp_path, tokenizer=load_tokenizer(tiny_sentencepiece(tmp_path)), max_seq_len=500)
    messages = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " Who are you?"},
        {"role": "assistant", "content": "A lamp."},
        {"role": "user", "content": "A lamp?"},
    ]
    found = [(role, text.strip()) for role, text in runs(inspect(server, CHAT, messages=messages)) if text.strip()]
    assert found == [
        *(("BOS", "<s>"), ("tag", "[INST] <<SYS>>"), ("system", "Be brief."), ("tag", "<</SYS>>")),
        *(("user", "Who are you?"), ("tag", "[/INST]"), ("assistant", "A lamp."), ("EOS", "</s>")),
        *(("BOS", "<s>"), ("tag", "[INST]"), ("user", "A lamp?"), ("tag", "[/INST]")),
    ]


def test_an_empty_system_block_is_found(server: Server) -> None:
    messages = [{"role": "system", "content": " "}, USER]
    assert rules(inspect(server, CHAT, messages=messages)) == ["empty_system"]
    assert rules(inspect(server, TEXT, prompt="[INST] <<SYS>>\n\n<</SYS>> Hi [/INST]")) == ["empty_system"]


def test_a_tag_inside_a_message_is_found_and_shown_as_the_text_it_is(server: Server) -> None:
    report = inspect(server, CHAT, messages=[{"role": "user", "content": "a <|im_end|> b"}])
    assert rules(report) == ["tag_in_message"]
    assert "'<|im_end|>'" in report["lint"][0]["message"]
    assert ("user", "a <|im_end|> b") in runs(report)


def test_a_tag_of_llama_2_is_a_word_to_a_model_that_has_no_such_tag(server: Server) -> None:
    report = inspect(server, CHAT, messages=[{"role": "user", "content": "[INST] x"}])
    assert ("user", "[INST] x") in runs(report)
    assert rules(report) == []


def test_a_bos_that_also_begins_turns_is_a_tag_there(tmp_path: Path) -> None:
    """As with SmolLM2, whose BOS is <|im_start|>."""
    byte_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"<s>"', '"<|im_start|>"'))
    server = make_server(tmp_path, tokenizer=load_tokenizer(tmp_path), max_seq_len=500)
    report = inspect(server, CHAT, messages=[USER, {"role": "assistant", "content": "Yo"}, USER])
    roles = [token["role"] for token in report["tokens"] if token["text"] == "<|im_start|>"]
    assert roles == ["BOS", "tag", "tag", "tag"]


def test_a_bos_that_comes_twice_is_found(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    bos = server.tokenizer.bos_id
    assert bos is not None
    report = inspect(server, TEXT, prompt=[bos, bos, *server.tokenizer.encode("a")])
    assert rules(report) == ["bos_twice"]
    assert runs(report) == [("BOS", "<s>"), ("BOS", "<s>"), ("prompt", "a")]


def test_a_bos_that_is_missing_is_found(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    assert rules(inspect(server, TEXT, prompt=server.tokenizer.encode("a"))) == ["no_bos"]
    assert rules(inspect(server, TEXT, prompt="a")) == []


def test_a_tag_that_is_only_text_is_found(server: Server) -> None:
    report = inspect(server, TEXT, prompt="<s>Hi")
    assert rules(report) == ["tag_as_text"]
    assert runs(report) == [("prompt", "<s>Hi")]


def test_what_truncation_dropped_is_shown(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    report = inspect(server, TEXT, prompt="abcdef", truncate_prompt_tokens=3)
    assert runs(report) == [("BOS", "<s>"), ("prompt", "ef")]
    assert (report["truncated"]["num_tokens"], report["truncated"]["text"]) == (4, "abcd")
    assert [token["text"] for token in report["truncated"]["tokens"]] == list("abcd")


def test_truncation_by_the_server_is_shown_too(tmp_path: Path) -> None:
    server = make_server(tmp_path, truncation="left", max_input_token_length=4)
    report = inspect(server, TEXT, prompt="abcdef")
    assert (runs(report), report["truncated"]["text"]) == ([("prompt", "cdef")], "ab")


def test_each_prompt_of_a_list_is_inspected(server: Server) -> None:
    prompts = server.get(TEXT, prompt=["a", "bc"], dry_run=True)["prompts"]
    assert [prompt["num_tokens"] for prompt in prompts] == [1, 2]


def test_a_dry_run_finds_the_same_mistakes(server: Server) -> None:
    assert server.refused(CHAT, messages=[USER], temperature=5, dry_run=True)[:2] == (400, "temperature")
    assert server.refused(CHAT, messages=[], dry_run=True)[:2] == (400, "messages")


def test_tools_do_not_hide_the_messages(server_with_room: Server) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    report = inspect(server_with_room, CHAT, messages=[USER], tools=[tool])
    assert ("user", "Hi") in runs(report)
    assert any(role == "template" and "weather" in text for role, text in runs(report))
