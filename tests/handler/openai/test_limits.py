"""What holds of both endpoints: numbers that no field can hold, vLLM's constraints, and min_tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.handler.openai.support import USER, FakeGrammar, Server

PATH = "v1/completions"


@pytest.mark.parametrize("path", ["v1/completions", "v1/chat/completions"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, float("inf"), float("nan")])
def test_a_number_that_no_field_can_hold_is_refused_by_its_field(server: Server, path: str, value: float) -> None:
    prompt = {"prompt": "a"} if path == "v1/completions" else {"messages": [USER]}
    named = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
    named |= {"seed", "n", "max_tokens", "truncate_prompt_tokens", "logprobs"}
    for name in named:
        status, param, message = server.refused(path, **prompt, **{name: value})
        assert (status, param, message.startswith(f"{name} must be")) == (400, name, True)
    for name, inside in (("logit_bias", {"1": value}), ("stop_token_ids", [value]), ("stop", value)):
        status, param, _ = server.refused(path, **prompt, **{name: inside})
        assert (status, str(param).startswith(name)) == (400, True)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("field", "grammar"),
    [
        ({"guided_json": SCHEMA}, FakeGrammar("json_schema", SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, FakeGrammar("json_schema", SCHEMA)),
        ({"structured_outputs": {"json": SCHEMA}}, FakeGrammar("json_schema", SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, FakeGrammar("regex", "a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, FakeGrammar("choice", ["a", "b"])),
        ({"structured_outputs": {"json_object": True}}, FakeGrammar("json_object")),
        ({"structured_outputs": {"disable_any_whitespace": False}}, None),
    ],
)
def test_vllms_constraints_become_the_same_grammars(server: Server, field: dict[str, Any], grammar: Any) -> None:
    assert server.request(PATH, prompt="a", **field).grammar == grammar


def test_min_tokens_reaches_the_engine(server: Server) -> None:
    assert server.request(PATH, prompt="a", min_tokens=16).params.min_tokens == 16
