"""Owns the way from a dialog to prompt ids: Llama 2's own format, or the model's chat template.

Knows no vocabulary file, no HTTP and no torch. In both ways a message is data: nothing in it can become control. That
holds for tools, calls and results of tools too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from llama2.errors import InvalidValue, shown
from llama2.text import tool_prompt
from llama2.text.dialog import DialogTurns, Message, Tool, check_calls, check_turns, merge_turns, read_messages
from llama2.text.tokenizer import SentencePieceTokenizer, Tokenizer

SpecialTags = Literal["encode", "reject"]

# Meta's reference, llama/generation.py. They are text: the model knows them by the ids that this text encodes to.
_INST, _END_INST = "[INST]", "[/INST]"
_SYS, _END_SYS = "<<SYS>>", "<</SYS>>"

# Private-use characters stand for the tags of a message until the control tokens around it have been found.
_PRIVATE_USE = range(0xE000, 0xF900)

# What templates look for in messages and tools: fields, and the values that say what something is.
_STRUCTURE = {
    *("role", "content", "system", "user", "assistant", "tool", "tool_calls", "tool_call_id", "id", "type"),
    *("function", "name", "description", "parameters", "arguments", "properties", "required", "items", "enum"),
    *("anyOf", "oneOf", "additionalProperties", "object", "array", "string", "number", "integer", "boolean", "null"),
}


def encode_dialog(
    tokenizer: Tokenizer,
    dialog: Sequence[Mapping[str, Any]],
    *,
    special_tags: SpecialTags = "encode",
    dialog_turns: DialogTurns = "merge",
    check_length: Callable[[int], None] | None = None,
) -> list[int]:
    """`encode_messages` of objects with a `role` and a `content`, and nothing else.

    Raises:
        ValueError: as there; an object has other fields.
    """
    messages = read_messages(dialog)
    return encode_messages(
        tokenizer, messages, special_tags=special_tags, dialog_turns=dialog_turns, check_length=check_length
    )


def encode_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] = (),
    special_tags: SpecialTags = "encode",
    dialog_turns: DialogTurns = "merge",
    template_kwargs: Mapping[str, Any] | None = None,
    check_length: Callable[[int], None] | None = None,
) -> list[int]:
    """The ids of a prompt that the assistant answers next.

    Tools, and calls of them, are written as the model's template does, or as `tool_prompt` does.

    Args:
        special_tags: a message that spells one of the model's control tokens is encoded character by character there:
            the same text, in ids that the model was never taught to obey. Or it is refused.
        dialog_turns: a chat template takes the turns that it takes. Llama 2's own format wants them strict: others are
            merged until they are, or refused.
        template_kwargs: variables for a chat template, such as `enable_thinking`. They are not checked; its own win.
        check_length: called before the text is tokenized, with a number that the ids will not be fewer than. What it
            raises is raised.

    Raises:
        InvalidValue: a message is out of turn or spells a control token.
        ValueError: the model has no chat format, or its template refuses the dialog.
    """
    for name, value, allowed in (
        ("special_tags", special_tags, get_args(SpecialTags)),
        ("dialog_turns", dialog_turns, get_args(DialogTurns)),
    ):
        if value not in allowed:
            raise InvalidValue(name, f"must be {' or '.join(map(repr, allowed))}, got {shown(value)}")
    check_calls(messages)
    if tokenizer.chat_template is None:
        check_turns(messages, dialog_turns)
    try:
        runs, tag_of = _write(tokenizer, messages, tools, special_tags, template_kwargs or {})
    except RecursionError:
        raise InvalidValue("tools", "or the arguments of a call are nested too deep") from None
    if check_length is not None:
        check_length(sum(1 if isinstance(run, int) else tokenizer.fewest_tokens(run) for run in runs))
    ids: list[int] = []
    for run in runs:
        ids += [run] if isinstance(run, int) else _encode_run(tokenizer, run, tag_of, after_special=bool(ids))
    return ids


def _write(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool],
    special_tags: SpecialTags,
    template_kwargs: Mapping[str, Any],
) -> tuple[list[str | int], dict[str, str]]:
    """The text of the prompt between its control tokens, and the tag that each mask in it stands for."""
    turns, offered = [message.as_json() for message in messages], [tool.as_json() for tool in tools]
    has_tools = bool(tools) or any(message.calls for message in messages)
    as_text = has_tools and not _template_takes_tools(tokenizer)
    tags = _tags(tokenizer, as_text=as_text)
    if special_tags == "reject":
        _refuse_tags(turns, offered, tags)
    masks = _masks(tags, "".join(_strings([turns, offered])), tokenizer.chat_template or "")
    if masks:
        pattern = re.compile("|".join(map(re.escape, masks)))
        turns, offered = _each_string([turns, offered], lambda text: pattern.sub(lambda match: masks[match[0]], text))
    if as_text:
        turns, offered = tool_prompt.as_text(turns, offered), []
    if tokenizer.chat_template is None:
        runs = _llama2_runs(tokenizer, merge_turns(turns))
    else:
        runs = _template_runs(tokenizer, turns, offered, template_kwargs)
    return runs, {mask: tag for tag, mask in masks.items()}


def _tags(tokenizer: Tokenizer, *, as_text: bool) -> list[str]:
    """What a message must not spell: every special token, and the tags that the format writes as text."""
    template = tokenizer.chat_template
    used = [tag for tag in (_INST, _END_INST, _SYS, _END_SYS) if template is None or tag in template]
    used += [tag for tag in tool_prompt.TAGS if as_text or (template is not None and tag in template)]
    return [*used, *(piece for piece in tokenizer.special_tokens if piece not in used)]


def _refuse_tags(turns: list[dict[str, Any]], tools: list[dict[str, Any]], tags: list[str]) -> None:
    parts = [*((f"messages[{index}]", turn) for index, turn in enumerate(turns)), ("tools", tools)]
    for field, value in parts:
        text = "\0".join(_strings(value))
        for tag in tags:
            if tag in text:
                raise InvalidValue(field, f"must not contain the special tag {tag!r}")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (str(key), *_strings(item))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _each_string(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a JSON value with each of its strings changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): _each_string(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_each_string(item, change) for item in value]
    return value


def _masks(tags: list[str], contents: str, template: str) -> dict[str, str]:
    """For each tag that occurs in a message a character that occurs nowhere."""
    found = [tag for tag in tags if tag in contents]
    taken = {*contents, *template} if found else set()
    free = [chr(code) for code in _PRIVATE_USE if found and chr(code) not in taken]
    if len(free) < len(found):
        raise ValueError("the dialog has special tags and every private-use character: it cannot be encoded")
    return dict(zip(found, free, strict=False))


def _llama2_runs(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> list[str | int]:
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


def _template_runs(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    template_kwargs: Mapping[str, Any],
) -> list[str | int]:
    runs = tokenizer.split_special(_render(tokenizer, messages, tools, template_kwargs))
    # Control tokens must come from the template alone: a dialog of the same shape without any text has the same ones.
    texts = {*(message["content"] for message in messages), *(set(_strings([messages, tools])) - _STRUCTURE)}
    if _may_complete_a_tag(texts, tokenizer.special_tokens):
        expected = tokenizer.split_special(_render(tokenizer, *_without_text(messages, tools), template_kwargs))
        if [run for run in runs if isinstance(run, int)] != [run for run in expected if isinstance(run, int)]:
            raise ValueError("the chat template and a message together spell a special token")
    return runs


def _may_complete_a_tag(texts: set[str], tags: Mapping[str, int]) -> bool:
    """Could a template spell one of the tags with a part of one of the texts? Its first or last character must then be
    in the text, or the text in the middle of it."""
    edges = {tag[0] for tag in tags} | {tag[-1] for tag in tags}
    everything = "\n".join(tags)
    return any(not edges.isdisjoint(text) or (text.strip() and text.strip() in everything) for text in texts)


def _without_text(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same dialog with another word for each text, except for the words that its structure is made of."""
    words: dict[str, str] = {}

    def other(text: str) -> str:
        return text if text in _STRUCTURE else words.setdefault(text, f"x{len(words)}")

    empty = [
        {**_each_string(message, other), "content": "x" if message["content"].strip() else ""} for message in messages
    ]
    return empty, _each_string(tools, other)


@functools.lru_cache(maxsize=1)
def _template_takes_tools(tokenizer: Tokenizer) -> bool:
    """Whether the name of a tool comes through the model's template."""
    if tokenizer.chat_template is None:
        return False
    tool = Tool(name="a_tool_to_look_for")
    try:
        return tool.name in _render(tokenizer, [{"role": "user", "content": "x"}], [tool.as_json()], {})
    except ValueError:
        return False


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    template_kwargs: Mapping[str, Any],
) -> str:
    # Imported here: importing this module must cost nothing to those who only complete text.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {**template_kwargs, **tokenizer.template_variables}
    try:
        rendered = render_jinja_template(
            [messages],
            tools=[*tools] or None,
            chat_template=tokenizer.chat_template,
            add_generation_prompt=True,
            **variables,
        )
    except (TemplateError, TypeError) as error:
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
