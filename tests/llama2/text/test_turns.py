"""Who speaks when: a chat template decides for itself, and Llama 2's own format has its turns merged or refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llama2.errors import InvalidValue
from llama2.text.chat import encode_dialog
from llama2.text.tokenizer import Tokenizer
from tests.llama2.text.test_chat import dialog, roles_of

JOIN = "; join the messages of one role, or have the server do so: dialog_turns: merge"


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("system system user", f"messages[1].role must be 'user', got 'system'{JOIN}"),
        ("user user", f"messages[1].role must be 'assistant', got 'user'{JOIN}"),
        ("user system", f"messages[1].role must be 'assistant', got 'system'{JOIN}"),
        ("system user assistant assistant", f"messages[3].role must be 'user', got 'assistant'{JOIN}"),
        # What no merging helps.
        ("assistant", "messages[0].role must be 'system' or 'user', got 'assistant'"),
        ("system", "messages[0].role must be 'user' in the last message, got 'system'"),
        ("system assistant", "messages[1].role must be 'user', got 'assistant'"),
        ("user assistant", "messages[1].role must be 'user' in the last message, got 'assistant'"),
    ],
)
def test_llama_2_wants_strict_turns(sp: Tokenizer, bpe: Tokenizer, roles: str, problem: str) -> None:
    """Unless they can be merged; a template takes all of them, whatever the setting."""
    messages = roles_of(*roles.split())
    with pytest.raises(InvalidValue) as caught:
        encode_dialog(sp, messages, dialog_turns="strict")
    assert str(caught.value) == problem
    if JOIN in problem and messages[-1]["role"] != "assistant":
        assert encode_dialog(sp, messages)
    else:
        with pytest.raises(InvalidValue, match="must be"):
            encode_dialog(sp, messages)
    assert encode_dialog(bpe, messages, dialog_turns="strict") == encode_dialog(bpe, messages)


def test_merged_turns_are_those_that_a_user_would_have_joined(sp: Tokenizer) -> None:
    messages = [
        {"role": role, "content": content}
        for role, content in [
            ("user", "a"), ("system", "S1"), ("user", " b"), ("assistant", "c"), ("assistant", "d"), ("system", "S2"),
            ("system", " \n"), ("user", "e"), ("user", "f"),
        ]
    ]  # fmt: skip
    joined = dialog("a\n\n b", "c\n\nd", "e\n\nf", system="S1\n\nS2")
    assert encode_dialog(sp, messages) == encode_dialog(sp, joined, dialog_turns="strict")


@pytest.fixture(scope="module")
def smollm2_of_transformers(bpe: Tokenizer) -> Any:
    return AutoTokenizer.from_pretrained(bpe.files[0].parent)


@settings(deadline=None, max_examples=100)
@given(roles=st.lists(st.sampled_from(["system", "user", "assistant"]), min_size=1, max_size=8))
def test_what_the_template_takes_is_what_transformers_writes(
    bpe: Tokenizer, smollm2_of_transformers: Any, roles: list[str]
) -> None:
    messages = [{"role": role, "content": f"text {index}"} for index, role in enumerate(roles)]
    theirs = smollm2_of_transformers.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert encode_dialog(bpe, messages) == theirs


def test_dialog_turns_is_one_of_two(sp: Tokenizer) -> None:
    with pytest.raises(ValueError, match="dialog_turns must be 'merge' or 'strict', got 'join'"):
        encode_dialog(sp, dialog("Hello"), dialog_turns="join")  # type: ignore[arg-type]
