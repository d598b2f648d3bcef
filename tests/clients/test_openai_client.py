"""The openai client, sync and async: every endpoint, streamed and whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.clients.conftest import Asker

pytestmark = pytest.mark.clients

PROMPT = "The history of the lighthouse begins"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
ANSWER = "The capital of France is Paris."


def texts(chunks: list[Any]) -> dict[int, str]:
    """What the chunks of a stream say, for each choice."""
    found: dict[int, str] = {}
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        said = choice.delta.content if hasattr(choice, "delta") else choice.text
        found[choice.index] = found.get(choice.index, "") + (said or "")
    return found


def counts(usage: Any) -> tuple[int, int, int]:
    """All but what was cached, which is more for the second of two equal prompts."""
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


# ---- models, and what vLLM has beside OpenAI's endpoints


def test_models_lists_the_model_and_retrieve_describes_it(ask: Asker) -> None:
    listed = ask("models.list").data[0]
    assert listed.object == "model"
    assert ask("models.retrieve", listed.id) == listed


def test_health_is_well_and_tokenize_is_undone_by_detokenize(ask: Asker) -> None:
    assert isinstance(ask("get", "/health", cast_to=object), dict)
    text = "two  spaces, 今日は 🙂"
    tokens = ask("post", "/tokenize", cast_to=object, body={"model": ask.model, "prompt": text})
    assert tokens["count"] == len(tokens["tokens"]) > 4
    body = {"model": ask.model, "tokens": tokens["tokens"]}
    assert ask("post", "/detokenize", cast_to=object, body=body)["prompt"] == text


# ---- completions


def test_a_completion(ask: Asker) -> None:
    reply = ask("completions.create", prompt=PROMPT, max_tokens=12, temperature=0)
    (choice,) = reply.choices
    assert (reply.object, choice.index, choice.finish_reason) == ("text_completion", 0, "length")
    assert len(choice.text.split()) > 4
    assert (reply.usage.completion_tokens, reply.usage.total_tokens) == (12, 12 + reply.usage.prompt_tokens)
    assert reply.model == ask.model
    assert reply.system_fingerprint


def test_a_streamed_completion_says_what_the_whole_one_says(ask: Asker) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = ask("completions.create", **fields)
    *chunks, last = ask("completions.create", **fields, stream=True, stream_options={"include_usage": True})
    assert texts(chunks) == {0: whole.choices[0].text}
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, counts(last.usage)) == ([], counts(whole.usage))
    assert {chunk.object for chunk in chunks} == {"text_completion"}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1


def test_without_include_usage_a_stream_has_no_usage(ask: Asker) -> None:
    for endpoint, fields in (("completions", {"prompt": PROMPT}), ("chat.completions", {"messages": QUESTION})):
        chunks = ask(f"{endpoint}.create", **fields, max_tokens=4, temperature=0, stream=True)
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_a_prompt_may_be_text_token_ids_or_a_list_of_either(ask: Asker) -> None:
    other = "1, 2, 3, 4,"
    ids = [ask("post", "/tokenize", cast_to=object, body={"prompt": text})["tokens"] for text in (PROMPT, other)]

    def complete(prompt: Any) -> list[str]:
        reply = ask("completions.create", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.text for choice in reply.choices]

    alone = complete(PROMPT) + complete(other)
    assert complete([PROMPT, other]) == alone
    assert complete(ids[0]) == alone[:1]
    assert complete(ids) == alone


def test_logprobs_of_a_completion_belong_to_its_tokens(ask: Asker) -> None:
    reply = ask("completions.create", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=3)
    (choice,) = reply.choices
    said = choice.logprobs
    assert "".join(said.tokens) == choice.text
    assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs) == len(said.text_offset) == 8
    for token, logprob, top in zip(said.tokens, said.token_logprobs, said.top_logprobs, strict=True):
        assert len(top) in (3, 4)
        assert top[token] == logprob == max(top.values()) < 0
    starts = list(itertools.accumulate((len(token) for token in said.tokens), initial=said.text_offset[0]))
    assert said.text_offset == starts[:-1]


def test_streamed_logprobs_are_those_of_the_whole_reply(ask: Asker) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 2}
    whole = ask("completions.create", **fields).choices[0].logprobs
    chunks = ask("completions.create", **fields, stream=True)
    said = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    for name in ("tokens", "text_offset"):
        assert [each for part in said for each in getattr(part, name)] == getattr(whole, name)
    streamed = [each for part in said for each in part.token_logprobs]
    assert streamed == pytest.approx(whole.token_logprobs, rel=1e-4)


def test_echo_without_new_tokens_scores_the_prompt(ask: Asker) -> None:
    reply = ask("completions.create", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = reply.choices
    assert (choice.text, reply.usage.completion_tokens) == (PROMPT, 0)
    assert "".join(choice.logprobs.tokens) == PROMPT
    first, *rest = choice.logprobs.token_logprobs
    assert first is None
    assert all(-30 < logprob < 0 for logprob in rest)
    assert len(rest) + 1 == reply.usage.prompt_tokens


def test_echo_with_new_tokens_has_both(ask: Asker) -> None:
    plain = ask("completions.create", prompt=PROMPT, max_tokens=5, temperature=0)
    reply = ask("completions.create", prompt=PROMPT, max_tokens=5, temperature=0, echo=True, logprobs=0)
    assert reply.choices[0].text == PROMPT + plain.choices[0].text
    assert len(reply.choices[0].logprobs.tokens) == reply.usage.total_tokens


def test_best_of_returns_the_likeliest(ask: Asker) -> None:
    """Of five drawn replies, n=2 gives the two with the highest mean log-probability, best first."""
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 6, "temperature": 1, "seed": 3, "logprobs": 0}

    def means(reply: Any) -> list[float]:
        return [sum(choice.logprobs.token_logprobs) / 6 for choice in reply.choices]

    every = ask("completions.create", **fields, n=5)
    best = ask("completions.create", **fields, n=2, best_of=5)
    assert means(best) == pytest.approx(sorted(means(every), reverse=True)[:2], rel=1e-3)


# ---- chat


def test_a_chat(ask: Asker) -> None:
    reply = ask("chat.completions.create", messages=QUESTION, temperature=0)
    (choice,) = reply.choices
    assert reply.object == "chat.completion"
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert not choice.message.tool_calls
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.system_fingerprint


def test_content_may_come_in_parts(ask: Asker) -> None:
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    reply = ask("chat.completions.create", messages=[{"role": "user", "content": parts}], temperature=0)
    assert reply.choices[0].message.content == ANSWER


def test_a_streamed_chat_names_the_role_first_and_ends_with_the_usage(ask: Asker) -> None:
    whole = ask("chat.completions.create", messages=QUESTION, temperature=0)
    first, *chunks, last = ask(
        "chat.completions.create",
        messages=QUESTION,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (first.object, first.choices[0].delta.role) == ("chat.completion.chunk", "assistant")
    assert texts([first, *chunks]) == {0: ANSWER}
    assert all(chunk.choices[0].delta.role is None for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert (last.choices, counts(last.usage)) == ([], counts(whole.usage))
    assert {chunk.system_fingerprint for chunk in [first, *chunks, last]} == {whole.system_fingerprint}


def test_logprobs_of_a_chat_spell_its_content(ask: Asker) -> None:
    messages = [{"role": "user", "content": "Repeat exactly: 今日は 🙂"}]
    reply = ask(
        "chat.completions.create", messages=messages, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = reply.choices[0].logprobs.content
    content = reply.choices[0].message.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace").startswith(content)
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob == token.logprob >= token.top_logprobs[1].logprob


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_a_chat_that_reaches_its_limit_says_so(ask: Asker, limit: str) -> None:
    reply = ask("chat.completions.create", messages=QUESTION, temperature=0, **{limit: 3})
    assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 3)


# ---- sampling


def test_n_replies_differ_and_their_streams_say_the_same(ask: Asker) -> None:
    # A seed whose numbers lie well inside their tokens' shares: a prompt computed again, in other pieces or from the
    # prefix cache, is rounded differently.
    fields: dict[str, Any] = {"messages": QUESTION, "n": 3, "max_tokens": 8, "temperature": 1.0, "seed": 11}
    whole = ask("chat.completions.create", **fields)
    said = {choice.index: choice.message.content for choice in whole.choices}
    assert sorted(said) == [0, 1, 2]
    assert len(set(said.values())) > 1
    chunks = ask("chat.completions.create", **fields, stream=True)
    assert texts(chunks) == said
    assert sum(choice.finish_reason is not None for chunk in chunks for choice in chunk.choices) == 3
    single = ask("chat.completions.create", **fields | {"n": 1})
    assert whole.usage.prompt_tokens == single.usage.prompt_tokens
    assert whole.usage.completion_tokens > single.usage.completion_tokens


def test_the_same_seed_repeats_a_reply_and_another_does_not(ask: Asker) -> None:
    def draw(seed: int) -> str:
        return ask("completions.create", prompt=PROMPT, max_tokens=12, temperature=1, seed=seed).choices[0].text

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize("stop", ["capital", ["nothing", "capital", " of Fr"]])
def test_a_stop_string_and_what_follows_are_not_said(ask: Asker, stop: Any) -> None:
    fields: dict[str, Any] = {"messages": QUESTION, "temperature": 0, "stop": stop}
    reply = ask("chat.completions.create", **fields)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("The ", "stop")
    assert texts(ask("chat.completions.create", **fields, stream=True)) == {0: "The "}


def test_logit_bias_forbids_and_forces_tokens(ask: Asker) -> None:
    fields: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    forced = ask("post", "/tokenize", cast_to=object, body={"prompt": " sea"})["tokens"]
    assert len(forced) == 1
    reply = ask("completions.create", **fields, logit_bias={str(forced[0]): 100})
    assert reply.choices[0].text == " sea" * 4
    plain = ask("completions.create", **fields).choices[0].text
    ids = ask("post", "/tokenize", cast_to=object, body={"prompt": plain})["tokens"]
    forbidden = ask("completions.create", **fields, logit_bias={str(ids[0]): -100}).choices[0].text
    assert forbidden.split()[0] != plain.split()[0]


def test_vllms_own_fields_pass_as_extra_body(ask: Asker) -> None:
    fields: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12}
    greedy = ask("chat.completions.create", **fields, temperature=1.5, extra_body={"top_k": 1})
    assert greedy.choices[0].message.content == ANSWER
    endless = ask("chat.completions.create", **fields, temperature=0, extra_body={"ignore_eos": True})
    assert (endless.choices[0].finish_reason, endless.usage.completion_tokens) == ("length", 12)
    choice = ask("chat.completions.create", **fields, extra_body={"guided_choice": ["London", "Rome"]})
    assert choice.choices[0].message.content in ("London", "Rome")
    found = ask("chat.completions.create", **fields, extra_body={"guided_regex": "[0-9]{3}-[0-9]{2}"})
    assert len(found.choices[0].message.content) == 6
