"""How messages become a prompt: turns, control tokens that they spell, names and variables of a template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llama2.text.tokenizer import load_tokenizer
from tests.handler.openai.support import SAID, USER, Server, make_server
from tests.handler.openai.test_chat import function
from tests.handler.support import byte_tokenizer
from tests.support.tokenizers import tiny_sentencepiece

PATH = "v1/chat/completions"


def test_a_message_may_spell_the_models_control_tokens(server: Server) -> None:
    """They are text there, and control nothing."""
    ids = server.request(PATH, messages=[{"role": "user", "content": "what is <|im_end|>?"}]).prompt_ids
    assert server.shown(ids) == SAID.replace("Hi", "what is <|im_end|>?")
    assert [ids.count(server.tokenizer.special_tokens[tag]) for tag in ("<|im_start|>", "<|im_end|>")] == [2, 1]


def test_a_server_can_refuse_what_spells_a_control_token(tmp_path: Path) -> None:
    server = make_server(tmp_path, special_tags="reject")
    spelled = {"role": "user", "content": "<|im_end|>"}
    assert server.refused(PATH, messages=[spelled])[:2] == (400, "messages[0]")
    assert "must not contain the special tag '<|im_end|>'" in server.refused(PATH, messages=[spelled])[2]
    tools = [function(description="<|im_end|>")]
    assert server.refused(PATH, messages=[USER], tools=tools)[:2] == (400, "tools")


@pytest.mark.parametrize(
    "roles",
    [("user", "user"), ("assistant", "user"), ("user", "assistant"), ("system", "user", "system"), ("system",)],
    ids=" ".join,
)
def test_a_template_gets_any_turns(server: Server, roles: tuple[str, ...]) -> None:
    ids = server.request(PATH, messages=[{"role": role, "content": "Hi"} for role in roles]).prompt_ids
    said = "".join(f"<|im_start|>{role}\nHi<|im_end|>\n" for role in roles)
    assert server.shown(ids) == f"{said}<|im_start|>assistant\n"


def with_template(folder: Path, template: str) -> Server:
    byte_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return make_server(folder, tokenizer=load_tokenizer(folder))


def test_a_template_gets_names_and_the_variables_of_the_body(tmp_path: Path) -> None:
    """bos_token is the model's own, whatever the body says."""
    template = "{{ bos_token }}{% for m in messages %}{{ m.name }}:{{ m.content }} {% endfor %}{{ think }} {{ style }}"
    server = with_template(tmp_path, template + " {{ reasoning_effort }}")
    messages = [USER | {"name": "Eve"}, {"role": "assistant", "content": "Yo", "name": "bot.2"}]
    kwargs = {"think": False, "style": "terse", "bos_token": "x"}
    body = {"messages": messages, "chat_template_kwargs": kwargs}
    request = server.request(PATH, **body, reasoning_effort="low")
    assert server.shown(request.prompt_ids) == "<s>Eve:Hi bot.2:Yo False terse low"
    tokenized = server.get("v1/tokenize", **body | {"chat_template_kwargs": kwargs | {"reasoning_effort": "low"}})
    assert tuple(tokenized["tokens"]) == request.prompt_ids
    roles = {token["role"] for token in tokenized["inspection"]["tokens"]}
    assert roles == {"BOS", "user", "assistant", "template"}


def test_a_name_that_is_a_tag_of_the_format_is_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "[INST] {{ messages[0].name }}"}))
    server = make_server(tmp_path, tokenizer=load_tokenizer(tokenizer.files[0]))
    (ids,) = [server.request(PATH, messages=[USER | {"name": "[INST]"}]).prompt_ids]
    plain = tokenizer.encode("[INST] [INST]")
    assert tokenizer.decode(ids) == tokenizer.decode(plain)
    assert len(ids) > len(plain)


def test_what_a_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    server = with_template(tmp_path, "{{ raise_exception('roles must alternate') }}")
    status, param, message = server.refused(PATH, messages=[USER, USER])
    assert (status, param) == (400, "messages")
    assert message.endswith("the model's chat template refuses this dialog: roles must alternate")


@pytest.mark.parametrize("path", [PATH, "v1/tokenize"])
def test_llama_2s_own_format_merges_turns_or_says_what_to_change(tmp_path: Path, path: str) -> None:
    tokenizer = load_tokenizer(tiny_sentencepiece(tmp_path))
    dialog = [USER, {"role": "user", "content": "Yo"}]
    merging = make_server(tmp_path, tokenizer=tokenizer)
    ids = merging.request(PATH, messages=dialog).prompt_ids
    assert tokenizer.decode(ids) == "[INST] Hi\n\nYo [/INST]"
    strict = make_server(tmp_path, tokenizer=tokenizer, dialog_turns="strict")
    status, param, message = strict.refused(path, messages=dialog)
    assert (status, param) == (400, "messages[1].role")
    assert message.startswith("messages[1].role must be 'assistant', got 'user'; join the messages of one role")
