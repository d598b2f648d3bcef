"""Completions, field by field: what the engine is asked, and what comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.handler.openai.support import LOGPROB, FakeGrammar, Server, make_server, usage

PATH = "v1/completions"


def test_a_reply_has_openais_shape(server: Server) -> None:
    reply = server.say(PATH, "xy", prompt="abc", model="smol")
    assert reply.pop("created") > 0
    assert reply == {
        "id": "cmpl-id",
        "object": "text_completion",
        "model": "smol",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "text": "xy", "logprobs": None, "finish_reason": "stop"}],
        "usage": usage(3, 2),
    }


def test_openais_defaults_hold_and_not_the_files(server: Server) -> None:
    params = server.request(PATH, prompt="a").params
    assert (params.max_new_tokens, params.temperature, params.top_p) == (16, 1.0, 1.0)
    assert (params.seed, params.logprobs, params.stop, params.ignore_eos) == (None, None, (), False)


@pytest.mark.parametrize("field", ["max_tokens", "temperature", "top_p", "n", "stop", "seed", "logit_bias", "stream"])
def test_null_is_the_default(server: Server, field: str) -> None:
    assert server.request(PATH, prompt="a", **{field: None}) == server.request(PATH, prompt="a")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        ("ids", ["hi"]),
        ("lists of ids", ["hi", "h"]),
    ],
)
def test_a_prompt_is_a_text_or_ids_or_several_of_either(server: Server, prompt: Any, texts: list[str]) -> None:
    h, i = server.tokenizer.encode("hi")
    prompt = {"ids": [h, i], "lists of ids": [[h, i], [h]]}.get(prompt, prompt) if isinstance(prompt, str) else prompt
    requests = server.requests(PATH, prompt=prompt)
    assert [server.shown(request.prompt_ids) for request in requests] == texts
    assert all(request.continues_prompt for request in requests)
    choices = server.say(PATH, *(f"to {text}" for text in texts), prompt=prompt)["choices"]
    assert [(choice["index"], choice["text"]) for choice in choices] == [
        (index, f"to {text}") for index, text in enumerate(texts)
    ]


def test_a_text_gets_the_bos_the_model_was_trained_with_and_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    assert server.shown(server.request(PATH, prompt="ab").prompt_ids) == "<s>ab"
    assert server.shown(server.request(PATH, prompt=server.tokenizer.encode("ab")).prompt_ids) == "ab"


@pytest.mark.parametrize(
    ("field", "value", "attribute", "expected"),
    [
        ("max_tokens", 7, "max_new_tokens", 7),
        ("temperature", 0, "temperature", 0),
        ("top_p", 0.25, "top_p", 0.25),
        ("stop", "x", "stop", ("x",)),
        ("stop", ["x", "yz"], "stop", ("x", "yz")),
        ("stop", [], "stop", ()),
        ("seed", -3, "seed", -3),
        ("logprobs", 2, "logprobs", 2),
        ("logprobs", 0, "logprobs", 0),
        ("logit_bias", {"5": -100, "6": 1.5}, "logit_bias", {5: -100, 6: 1.5}),
        ("presence_penalty", 1.5, "presence_penalty", 1.5),
        ("frequency_penalty", -2, "frequency_penalty", -2),
        ("top_k", 5, "top_k", 5),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
        ("ignore_eos", True, "ignore_eos", True),
        ("stop_token_ids", [3, 4], "stop_token_ids", (3, 4)),
        ("skip_special_tokens", True, "stop", ()),
    ],
)
def test_a_sampling_field_reaches_the_engine(
    server: Server, field: str, value: Any, attribute: str, expected: Any
) -> None:
    for path, prompt in (
        (PATH, {"prompt": "a"}),
        ("v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        if field == "logprobs" and "prompt" not in prompt:
            continue
        params = server.request(path, **prompt, **{field: value}).params
        assert getattr(params, attribute) == expected


def test_top_p_zero_leaves_the_likeliest_token_alone(server: Server) -> None:
    assert 0 < server.request(PATH, prompt="a", top_p=0).params.top_p < 1e-300


def test_n_replies_come_from_one_request_and_are_counted_through(server: Server) -> None:
    first, second = server.requests(PATH, prompt=["a", "b"], n=2)
    assert (first.n, second.n) == (2, 2)
    reply = server.say(PATH, "A0", "A1", "B0", "B1!", prompt=["a", "b"], n=2)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [
        *((0, "A0"), (1, "A1"), (2, "B0"), (3, "B1!")),
    ]
    assert reply["usage"] == usage(2, 9)


def test_best_of_samples_more_than_it_shows_and_shows_the_likeliest(server: Server) -> None:
    """A capital is less likely. What was sampled is paid for, and log-probabilities are shown to those who ask."""
    assert server.request(PATH, prompt="p", n=2, best_of=3).n == 3
    reply = server.say(PATH, "aBB", "aaB", "aa", prompt="p", n=2, best_of=3)
    assert [(choice["index"], choice["text"]) for choice in reply["choices"]] == [(0, "aa"), (1, "aaB")]
    assert reply["usage"]["completion_tokens"] == 8
    assert all(choice["logprobs"] is None for choice in reply["choices"])


def test_logprobs_are_four_lists_whose_offsets_find_the_tokens_in_the_text(server: Server) -> None:
    (choice,) = server.say(PATH, "xAy", prompt="p", logprobs=1)["choices"]
    assert choice["logprobs"] == {
        "tokens": ["x", "A", "y"],
        "token_logprobs": [LOGPROB, -2.0, LOGPROB],
        "top_logprobs": [{"x": LOGPROB}, {"a": -0.25, "A": -2.0}, {"y": LOGPROB}],
        "text_offset": [0, 1, 2],
    }


def test_logprobs_zero_cover_only_the_chosen_tokens(server: Server) -> None:
    (choice,) = server.say(PATH, "A", prompt="p", logprobs=0)["choices"]
    assert choice["logprobs"]["top_logprobs"] == [{"A": -2.0}]


def test_echo_repeats_the_prompt_and_scores_it(server: Server) -> None:
    """Nothing before the first token could give it a probability."""
    request = server.request(PATH, prompt="pQ", echo=True, logprobs=1)
    assert (request.prompt_logprobs, request.generate) == (1, True)
    reply = server.say(PATH, "x", prompt="pQ", echo=True, logprobs=1, max_tokens=1, finish_reason="length")
    (choice,) = reply["choices"]
    assert choice["text"] == "pQx"
    assert choice["logprobs"] == {
        "tokens": ["p", "Q", "x"],
        "token_logprobs": [None, -2.0, LOGPROB],
        "top_logprobs": [None, {"a": -0.25, "Q": -2.0}, {"x": LOGPROB}],
        "text_offset": [0, 1, 2],
    }
    assert reply["usage"] == usage(2, 1)


def test_echo_with_max_tokens_zero_scores_and_generates_nothing(server: Server) -> None:
    ids = [server.tokenizer.encode("pq"), server.tokenizer.encode("r")]
    body = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
    assert [request.generate for request in server.requests(PATH, **body)] == [False, False]
    reply = server.say(PATH, "", "", finish_reason="length", **body)
    assert [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in reply["choices"]] == [
        *(("pq", [None, LOGPROB]), ("r", [None])),
    ]
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
    assert reply["usage"]["completion_tokens"] == 0


def test_echo_alone_repeats_and_scores_nothing(server: Server) -> None:
    assert server.request(PATH, prompt="ab", echo=True).prompt_logprobs is None
    (choice,) = server.say(PATH, "c", prompt="ab", echo=True)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("abc", None)


def test_echo_with_several_replies_scores_the_prompt_in_each(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "pQ", "n": 2, "echo": True, "logprobs": 0}
    whole = server.say(PATH, "x", "y", **body)["choices"]
    assert [choice["logprobs"]["token_logprobs"] for choice in whole] == [[None, -2.0, LOGPROB]] * 2
    events = server.stream(PATH, "x", "y", **body)
    first = [event["choices"][0] for event in events if event["choices"][0]["text"]]
    assert [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in first] == [
        *(("pQx", [None, -2.0, LOGPROB]), ("pQy", [None, -2.0, LOGPROB])),
    ]


def test_offsets_count_characters_and_tokens_that_are_no_text_are_named_by_their_bytes(server: Server) -> None:
    (choice,) = server.say(PATH, "", prompt="é!", echo=True, logprobs=0, finish_reason="length")["choices"]
    assert choice["logprobs"]["tokens"] == [r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]


def test_special_tokens_are_named_by_their_spelling(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    (choice,) = server.say(PATH, "", prompt="a", echo=True, logprobs=0, finish_reason="length")["choices"]
    assert (choice["text"], choice["logprobs"]["tokens"]) == ("a", ["<s>", "a"])
    assert choice["logprobs"]["text_offset"] == [0, 0]


def test_a_prompt_and_its_reply_may_fill_the_context_to_the_last_token(server: Server) -> None:
    assert server.request(PATH, prompt="a" * 90, max_tokens=10).params.max_new_tokens == 10


@pytest.mark.parametrize(
    ("field", "value", "grammar"),
    [
        ("guided_regex", "a+", FakeGrammar("regex", "a+")),
        ("guided_choice", ["yes", "no"], FakeGrammar("choice", ["yes", "no"])),
        ("response_format", {"type": "json_object"}, FakeGrammar("json_object")),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a"}}, FakeGrammar("json_object")),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "string"}}},
            FakeGrammar("json_schema", {"type": "string"}),
        ),
        ("response_format", {"type": "text"}, None),
    ],
)
def test_what_constrains_a_reply_becomes_a_grammar(server: Server, field: str, value: Any, grammar: Any) -> None:
    assert server.request(PATH, prompt="a", **{field: value}).grammar == grammar


def test_truncate_prompt_tokens_keeps_the_end_and_the_bos(tmp_path: Path) -> None:
    server = make_server(tmp_path, add_bos=True)
    assert server.shown(server.request(PATH, prompt="abcdef", truncate_prompt_tokens=3).prompt_ids) == "<s>ef"
    assert server.shown(server.request(PATH, prompt="ab", truncate_prompt_tokens=9).prompt_ids) == "<s>ab"
    longest = server.request(PATH, prompt="a" * 200, truncate_prompt_tokens=-1)
    assert len(longest.prompt_ids) == 99


def test_a_user_is_named_in_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        server.request(PATH, prompt="a", user="eve\nroot")
    assert r"request id is for user 'eve\nroot'" in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({}, 400, "prompt", "prompt is missing"),
        ({"prompt": []}, 400, "prompt", "prompt must not be empty"),
        ({"prompt": ""}, 400, "prompt", "prompt must not be empty"),
        ({"prompt": [[]]}, 400, "prompt[0]", "prompt[0] must not be empty"),
        ({"prompt": None}, 400, "prompt", "prompt must be a string, a list of strings"),
        ({"prompt": ["a", 5]}, 400, "prompt[1]", "prompt[1] must be a string, got 5"),
        ({"prompt": [5, "a"]}, 400, "prompt[1]", "prompt[1] must be an integer, got 'a'"),
        ({"prompt": [-1]}, 400, "prompt[0]", "must be at least 0, got -1"),
        ({"prompt": [[1], [99999]]}, 400, "prompt[1]", "must hold token ids from 0 to 259, got 99999"),
        ({"prompt": "\ud800"}, 400, "prompt", "lone surrogate"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model", "the model 'gpt-4' does not exist"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix", "suffix is not supported"),
        ({"prompt": "a", "max_token": 5}, 400, "max_token", "is an unknown field: did you mean 'max_tokens'?"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "must be at least 0, got -1"),
        ({"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "must be an integer, got '5'"),
        ({"prompt": "a" * 90, "max_tokens": 11}, 400, "prompt", "maximum context length is 100 tokens, but 101"),
        ({"prompt": "a" * 100}, 400, "prompt", "has at least 100 tokens, but at most 99 are taken"),
        ({"prompt": "a", "temperature": 2.1}, 400, "temperature", "must be at most 2.0"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature", "must be a finite number"),
        ({"prompt": "a", "top_p": -0.1}, 400, "top_p", "must be at least 0.0"),
        ({"prompt": "a", "n": 0}, 400, "n", "must be at least 1"),
        ({"prompt": "a", "n": 5}, 400, "n", "must be at most 4 on this server, got 5"),
        ({"prompt": "a", "n": True}, 400, "n", "must be an integer, got True"),
        ({"prompt": "a", "n": 3, "best_of": 2}, 400, "best_of", "must be at least n=3, got 2"),
        ({"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", "cannot be streamed"),
        ({"prompt": "a", "n": 2, "max_tokens": 0}, 400, "n", "must be 1 with max_tokens=0, got 2"),
        ({"prompt": ["a"] * 300, "n": 4}, 400, "prompt", "asks for 1200 replies"),
        ({"prompt": "a", "stop": [""]}, 400, "stop", "must be at most 64 strings of 1 to 1000 characters"),
        ({"prompt": "a", "stop": ["x"] * 65}, 400, "stop", "must be at most 64 strings"),
        ({"prompt": "a", "stop": ["x", 5]}, 400, "stop", "must be at most 64 strings"),
        ({"prompt": "a", "seed": 2**63}, 400, "seed", "must be an integer from"),
        ({"prompt": "a", "logprobs": 21}, 400, "logprobs", "must be an integer from 0 to 20, got 21"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs", "must be an integer"),
        ({"prompt": "a", "logprobs": False, "best_of": 2}, 400, "logprobs", "must be an integer"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "got the key 'x'"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias.5", "must be at most 100.0"),
        ({"prompt": "a", "logit_bias": {"99999": 1}}, 400, "logit_bias", "token ids from 0 to 259, got 99999"),
        ({"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty", "must be a number in [-2, 2]"),
        ({"prompt": "a", "frequency_penalty": -3}, 400, "frequency_penalty", "must be a number in [-2, 2]"),
        ({"prompt": "a", "user": 5}, 400, "user", "must be a string"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream", "must be true or false"),
        ({"prompt": "a", "stream_options": {}}, 400, "stream_options", "needs stream to be true"),
        (
            {"prompt": "a", "stream": True, "stream_options": {"include_obfuscation": True}},
            *(400, "stream_options.include_obfuscation", "is not supported"),
        ),
        ({"prompt": "a", "response_format": {"type": "xml"}}, 400, "response_format", "must have a 'type' of 'text'"),
        (
            {"prompt": "a", "response_format": {"type": "json_schema"}},
            *(400, "response_format.json_schema", "response_format.json_schema is missing"),
        ),
        (
            {
                "prompt": "a",
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
                },
            },
            *(400, "response_format", "there is no type 'nonsense'"),
        ),
        ({"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, 400, "guided_choice", "cannot be combined"),
        ({"prompt": "a", "guided_regex": "a", "ignore_eos": True}, 400, "ignore_eos", "cannot be combined"),
        ({"prompt": "a", "guided_json": "{"}, 400, "guided_json", "guided_json: Expecting"),
        ({"prompt": "a", "guided_json": "[]"}, 400, "guided_json", "the schema must be a JSON object"),
        ({"prompt": "a", "guided_json": 5}, 400, "guided_json", "must be a JSON schema or its text"),
        ({"prompt": "a", "structured_outputs": {"grammar": "a"}}, 400, "structured_outputs.grammar", "not supported"),
        (
            {"prompt": "a", "structured_outputs": {"regex": "a", "choice": ["b"]}},
            400,
            "structured_outputs.choice",
            "be",
        ),
        ({"prompt": "a", "guided_choice": ["a"], "min_tokens": 5}, 400, "min_tokens", "combined with guided_choice"),
        ({"prompt": "a", "min_tokens": 17}, 400, "min_tokens", "must be at most 16, the limit, got 17"),
        ({"prompt": "a", "min_token": 5}, 400, "min_token", "did you mean 'min_tokens'?"),
        ({"prompt": "a", "max_new_tokens": 5}, 400, "max_new_tokens", "did you mean 'max_tokens'?"),
        ({"prompt": "a", "top_a": 5}, 400, "top_a", "top_a is an unknown field: known are adapter, best_of,"),
        ({"prompt": "a", "min_length": 5}, 400, "min_length", "is an unknown field: known are adapter, best_of,"),
        ({"prompt": "a", "guided_choice": []}, 400, "guided_choice", "must not be empty"),
        ({"prompt": "a", "top_k": -2}, 400, "top_k", "must be an integer from -1"),
        ({"prompt": "a", "min_p": 1.5}, 400, "min_p", "must be a number in [0, 1]"),
        ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty", "must be a number in (0, 100]"),
        ({"prompt": "a", "stop_token_ids": [99999]}, 400, "stop_token_ids", "token ids from 0 to 259"),
        ({"prompt": "a", "skip_special_tokens": False}, 400, "skip_special_tokens", "is not supported"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens", "must leave a token"),
        ({"prompt": "a", "echo": 1}, 400, "echo", "must be true or false"),
    ],
)
def test_a_mistake_is_refused_and_named(
    server: Server, body: dict[str, Any], status: int, param: str, message: str
) -> None:
    refused = server.refused(PATH, **body)
    assert refused[:2] == (status, param)
    assert message in refused[2]
