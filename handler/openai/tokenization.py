"""Owns `tokenize` and `detokenize`, which are vLLM's: their fields, and what they answer.

Knows no engine.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from handler.call import Format
from handler.openai.fields import Body, TokenId, only, parse
from handler.openai.functions import Tools, typed_tools
from handler.openai.generation import Model
from handler.openai.inspector import Inspector
from handler.openai.messages import Messages, TemplateKwargs
from handler.openai.replies import Immediate
from handler.prompt import Prompt
from llama2.errors import InvalidValue

_ENDS = "a prompt ends where the assistant begins"


class TokenizeBody(Body):
    """A prompt, or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools = Field(default_factory=list)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False
    add_generation_prompt: Annotated[Any, only(True, why=_ENDS)] = None
    continue_final_message: Annotated[Any, only(False, why=_ENDS)] = None
    chat_template: Annotated[Any, only(why="the model's own template is used")] = None
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[TokenId]


def tokenize(model: Model, raw: Any) -> Format:
    """Both raise InvalidValue or RequestError: a field is wrong."""
    body = parse(TokenizeBody, raw)
    model.name(body.model)
    inspection: dict[str, Any] = {}
    if body.messages is not None and body.prompt is None:
        if body.add_special_tokens:
            raise InvalidValue("add_special_tokens", "must be false with messages: the chat format has its own")
        messages, tools = [one.typed() for one in body.messages], typed_tools(body.tools)
        kwargs = body.chat_template_kwargs
        encoded = model.prompts.chat(messages, tools, template_kwargs=kwargs, special_tags="encode")
        prompt = Prompt(ids=tuple(encoded.ids))
        inspection["inspection"] = Inspector(model).dialog(prompt, encoded, messages, tools, kwargs)
    elif body.prompt is not None and body.messages is None:
        encoded = model.prompts.text(body.prompt, "prompt", with_bos=body.add_special_tokens is not False)
    else:
        raise InvalidValue("prompt", "or messages must be there, and not both")
    names = [model.token_names.name(token_id) for token_id in encoded.ids] if body.return_token_strs else None
    return Immediate(
        reply={
            "count": len(encoded.ids),
            "max_model_len": model.config.engine.max_seq_len,
            "tokens": encoded.ids,
            "token_strs": names,
            **inspection,
        }
    )


def detokenize(model: Model, raw: Any) -> Format:
    body = parse(DetokenizeBody, raw)
    model.name(body.model)
    for index, token_id in enumerate(body.tokens):
        if token_id >= model.tokenizer.vocab_size:
            raise InvalidValue(f"tokens[{index}]", f"must be less than {model.tokenizer.vocab_size}, got {token_id}")
    return Immediate(reply={"prompt": model.token_names.spell(body.tokens)})
