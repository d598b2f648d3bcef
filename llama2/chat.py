"""Owns the way from a dialog to prompt ids: Llama 2's own format, or the model's chat template.

Knows no vocabulary file, no HTTP and no torch. In both ways a message is data: nothing in it can become control.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from llama2.tokenizer import SentencePieceTokenizer, Tokenizer

# Meta's reference, llama/generation.py. They are text: the model knows them by the ids that this text encodes to.
_INST, _END_INST = "[INST]", "[/INST]"
_SYS, _END_SYS = "<<SYS>>", "<</SYS>>"

# Private-use characters stand for the tags of a message until the control tokens around it have been found.
_PRIVATE_USE = range(0xE000, 0xF900)


def encode_dialog(
    tokenizer: Tokenizer,
    dialog: Sequence[Mapping[str, str]],
    *,
    special_tags: Literal["reject", "encode"] = "reject",
) -> list[int]:
    """The ids of a prompt that the assistant answers next.

    `dialog` is [system,] user, assistant, user, ... and ends with user; each message has a `role` and a `content`.
    A message that spells one of the model's control tokens is refused, or with `special_tags="encode"` the spelling is
    encoded character by character: the same text, in ids that the model was never taught to obey.

    Raises:
        ValueError: the dialog is empty, a turn (counted from 1) has a wrong role or field, or spells a control token;
            or this model has no chat format.
    """
    if special_tags not in ("reject", "encode"):
        raise ValueError(f"special_tags must be 'reject' or 'encode', got {special_tags!r}")
    messages = _checked(dialog)
    tags = _tags(tokenizer)
    if special_tags == "reject":
        _refuse_tags(messages, tags)
    masks = _masks(tags, messages, tokenizer.chat_template or "")
    masked = [{**message, "content": _replace(message["content"], masks)} for message in messages]
    runs = _llama2_runs(tokenizer, masked) if tokenizer.chat_template is None else _template_runs(tokenizer, masked)
    tag_of = {mask: tag for tag, mask in masks.items()}
    ids: list[int] = []
    for run in runs:
        ids += [run] if isinstance(run, int) else _encode_run(tokenizer, run, tag_of, after_special=bool(ids))
    return ids


def _checked(dialog: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    if isinstance(dialog, (str, bytes)) or not isinstance(dialog, Sequence) or not dialog:
        raise ValueError("dialog must be a list of at least one message")
    roles: list[str] = []
    for turn, message in enumerate(dialog, start=1):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"turn {turn}: a message must have a role and a content, and nothing else")
        if not isinstance(message["content"], str):
            raise ValueError(f"turn {turn}: content must be a string, got {type(message['content']).__name__}")
        starts_with_system = roles[:1] == ["system"]
        expected = "assistant" if (len(roles) - starts_with_system) % 2 else "user"
        if message["role"] != expected and (roles or message["role"] != "system"):
            allowed = f"'{expected}'" if roles else "'system' or 'user'"
            raise ValueError(f"turn {turn}: role must be {allowed}, got {message['role']!r}")
        roles.append(message["role"])
    if roles[-1] != "user":
        raise ValueError(f"turn {len(roles)}: the last turn must be the user's, got {roles[-1]!r}")
    return [dict(message) for message in dialog]


def _tags(tokenizer: Tokenizer) -> list[str]:
    """What a message must not spell: every special token, and Llama 2's tags where the format uses them."""
    template = tokenizer.chat_template
    used = [tag for tag in (_INST, _END_INST, _SYS, _END_SYS) if template is None or tag in template]
    return [*used, *tokenizer.special_tokens]


def _refuse_tags(messages: list[dict[str, str]], tags: list[str]) -> None:
    for turn, message in enumerate(messages, start=1):
        for tag in tags:
            if tag in message["content"]:
                raise ValueError(f"turn {turn}: a message must not contain the special tag {tag!r}")


def _masks(tags: list[str], messages: list[dict[str, str]], template: str) -> dict[str, str]:
    """For each tag that occurs in a message a character that occurs nowhere."""
    contents = "".join(message["content"] for message in messages)
    found = [tag for tag in tags if tag in contents]
    taken = {*contents, *template}
    free = [chr(code) for code in _PRIVATE_USE if found and chr(code) not in taken]
    if len(free) < len(found):
        raise ValueError("the dialog has special tags and every private-use character: it cannot be encoded")
    return dict(zip(found, free, strict=False))


def _replace(text: str, replacements: Mapping[str, str]) -> str:
    pattern = "|".join(map(re.escape, replacements)) or "(?!)"
    return re.sub(pattern, lambda match: replacements[match[0]], text)


def _llama2_runs(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str | int]:
    """BOS, `[INST] <<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user} [/INST] {answer} `, EOS, BOS, `[INST] {user} [/INST]`."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    if not isinstance(tokenizer, SentencePieceTokenizer) or bos is None or eos is None:
        raise ValueError(f"{tokenizer.files[0]} has no chat format: its tokenizer_config.json has no chat_template")
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    texts = [message["content"] for message in messages if message["role"] != "system"]
    if system.strip():
        texts[0] = f"{_SYS}\n{system}\n{_END_SYS}\n\n{texts[0]}"
    texts = [text.strip() for text in texts]
    runs: list[str | int] = []
    for user, answer in zip(texts[::2], texts[1::2], strict=False):
        runs += [bos, f"{_INST} {user} {_END_INST} {answer} ", eos]
    return [*runs, bos, f"{_INST} {texts[-1]} {_END_INST}"]


def _template_runs(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[str | int]:
    runs = tokenizer.split_special(_render(tokenizer, messages))
    # Control tokens must come from the template alone: a dialog of the same shape without any text has the same ones.
    empty = [{**message, "content": "x" if message["content"].strip() else ""} for message in messages]
    expected = tokenizer.split_special(_render(tokenizer, empty))
    if [run for run in runs if isinstance(run, int)] != [run for run in expected if isinstance(run, int)]:
        raise ValueError("the chat template and a message together spell a special token")
    return runs


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    # Imported here: importing this module must cost nothing to those who only complete text.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**tokenizer.template_variables}
    try:
        rendered = render_jinja_template(
            [messages], chat_template=tokenizer.chat_template, add_generation_prompt=True, **variables
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses this dialog: {error}") from None
    return rendered[0][0]  # of (texts, spans), the text of the first dialog


def _encode_run(tokenizer: Tokenizer, run: str, tag_of: Mapping[str, str], *, after_special: bool) -> list[int]:
    """The ids of the text between two control tokens, in which every masked tag is put back, spelled out."""
    text, tag_offsets = _unmask(tokenizer, run, tag_of)
    ids = tokenizer.encode(text, after_special=after_special)
    if not tag_offsets:
        return ids
    pieces = [tokenizer.token_bytes(token_id) for token_id in ids]
    # SentencePiece puts a space before the first word.
    position = len(text.encode()) - len(b"".join(pieces))
    if position not in (0, -1) or b"".join(pieces)[-position:] != text.encode():
        raise ValueError("this tokenizer rewrites text: a message with special tags cannot be encoded by it")
    spelled: list[int] = []
    for token_id, piece in zip(ids, pieces, strict=True):
        end = position + len(piece)
        spelled += [token_id] if tag_offsets.isdisjoint(range(position, end)) else tokenizer.spell(piece)
        position = end
    return spelled


def _unmask(tokenizer: Tokenizer, run: str, tag_of: Mapping[str, str]) -> tuple[str, set[int]]:
    """`run` with the tags of its messages in place, and the offset of every byte (of UTF-8) of those tags."""
    parts = re.split(f"([{''.join(tag_of)}])", run) if tag_of else [run]
    for mask in tag_of.keys() & set(parts):
        _check_spelling_differs(tokenizer, tag_of[mask])
    offsets: set[int] = set()
    end = 0
    for index, part in enumerate(parts):
        parts[index] = tag_of.get(part, part)
        start, end = end, end + len(parts[index].encode(errors="surrogatepass"))
        if part in tag_of:
            offsets |= set(range(start, end))
    return "".join(parts), offsets


def _check_spelling_differs(tokenizer: Tokenizer, tag: str) -> None:
    """Special tokens never come out of text. The other tags do, and need a piece that spelling them out takes apart."""
    pieces = [tokenizer.token_bytes(token_id).strip() for token_id in tokenizer.encode(tag)]
    if tag not in tokenizer.special_tokens and max(map(len, pieces)) == 1:
        raise ValueError(f"this vocabulary encodes {tag!r} character by character: a message must not contain it")
