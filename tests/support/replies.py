"""What a model that knows nothing replies: at every step any token that a grammar lets through."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llama2.engine.sequence import Matcher
from llama2.engine.token_masks import forbid
from llama2.text.grammar import CompiledGrammar
from llama2.text.tokenizer import Tokenizer

# A model's vocabulary is often larger than its tokenizer's.
PADDING = 40


def restrict(matcher: Matcher, logits_V: torch.Tensor) -> torch.Tensor:
    """The logits, with -inf for whatever cannot follow."""
    return forbid(logits_V[None], [matcher.mask_W()])[0]


def random_reply(
    tokenizer: Tokenizer,
    grammar: CompiledGrammar,
    seed: int,
    *,
    continues_prompt: bool = False,
    max_new_tokens: int = 400,
    favoured: Mapping[int, float] | None = None,
    begins: str = "",
) -> tuple[str, bool]:
    """The text of one reply, and whether it came to its end. `begins` is what the model has said already."""
    matcher = grammar.matcher(continues_prompt=continues_prompt)
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.spell(begins.encode())
    for token_id in ids:
        assert restrict(matcher, torch.zeros(tokenizer.vocab_size + PADDING))[token_id] == 0, "not let through"
        matcher.accept(token_id)
    for _ in range(max_new_tokens):
        logits_V = torch.randn(tokenizer.vocab_size + PADDING, generator=generator)
        for token_id, bias in (favoured or {}).items():
            logits_V[token_id] += bias
        logits_V = restrict(matcher, logits_V)
        token_id = int(logits_V.argmax())
        assert logits_V[token_id] > -torch.inf
        assert token_id < tokenizer.vocab_size, "a padded id was let through"
        if token_id in tokenizer.eos_ids:
            return _text(tokenizer, ids, continues_prompt=continues_prompt), True
        assert tokenizer.token_bytes(token_id), "a special token was let through"
        matcher.accept(token_id)
        ids.append(token_id)
    return _text(tokenizer, ids, continues_prompt=continues_prompt), False


def accepts(tokenizer: Tokenizer, grammar: CompiledGrammar, text: str) -> bool:
    """Can a reply be just this text, written in single characters?"""
    matcher = grammar.matcher()

    def allows(token_id: int) -> bool:
        return bool(int(matcher.mask_W()[token_id // 32]) >> token_id % 32 & 1)

    for token_id in tokenizer.spell(text.encode(errors="surrogatepass")):
        if not allows(token_id):
            return False
        matcher.accept(token_id)
    return allows(min(tokenizer.eos_ids))


def _text(tokenizer: Tokenizer, ids: list[int], *, continues_prompt: bool) -> str:
    pieces = [
        tokenizer.token_bytes(token_id, first=index == 0 and not continues_prompt) for index, token_id in enumerate(ids)
    ]
    return b"".join(pieces).decode(errors="ignore")


def follows(value: Any, schema: Any) -> bool:
    """Whether a value follows a JSON schema, for the keywords that the tests use."""
    if isinstance(schema, bool):
        return schema
    types = schema.get("type", [])
    if types and not any(_has_type(value, name) for name in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(follows(value, case) for case in schema["anyOf"]):
        return False
    if isinstance(value, str):
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, (int, float)):
        return (
            schema.get("minimum", value) <= value <= schema.get("maximum", value)
            and value > schema.get("exclusiveMinimum", -math.inf)
            and value < schema.get("exclusiveMaximum", math.inf)
        )
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        rest = schema.get("items", True)
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)) and all(
            follows(item, first[index] if index < len(first) else rest) for index, item in enumerate(value)
        )
    if isinstance(value, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        return set(schema.get("required", [])) <= value.keys() and all(
            follows(item, properties.get(name, extra)) for name, item in value.items()
        )
    return True


def _has_type(value: Any, name: str) -> bool:
    if name in ("integer", "number"):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (name == "number" or float(value).is_integer())
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, kinds[name])
