"""A stream of completions adds up to the whole reply, and counts what it used. That of chats is tested with chats."""

from __future__ import annotations

from typing import Any

import pytest

from tests.handler.openai.support import Server, usage

PATH = "v1/completions"


def test_best_of_as_many_as_are_shown_is_streamed(server: Server) -> None:
    assert len(server.stream(PATH, "x", "y", prompt="p", n=2, best_of=2)) == 4


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_a_stream_adds_up_to_the_whole_reply(server: Server, echo: bool, logprobs: int | None) -> None:
    body: dict[str, Any] = {"prompt": ["p", "qr"], "n": 2, "echo": echo, "logprobs": logprobs}
    replies = ("xY", "", "z", "uvw")
    whole = server.say(PATH, *replies, **body)["choices"]
    sums: list[dict[str, Any]] = [{"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(4)]
    for event in server.stream(PATH, *replies, **body):
        (piece,) = event["choices"]
        total = sums[piece["index"]]
        assert total["finish_reason"] is None, "nothing comes after the reason"
        total["text"] += piece["text"]
        total["finish_reason"] = piece["finish_reason"]
        if piece["logprobs"]:
            for name, values in piece["logprobs"].items():
                total["logprobs"] = total["logprobs"] or {name: [] for name in piece["logprobs"]}
                total["logprobs"][name] += values
    assert sums == whole


def test_every_event_of_a_stream_names_the_same_reply(server: Server) -> None:
    events = server.stream(PATH, "xy", prompt="p")
    assert {(event["id"], event["object"], event["model"], event["system_fingerprint"]) for event in events} == {
        ("cmpl-id", "text_completion", "smol", "fp_1")
    }
    assert all("usage" not in event for event in events)


def test_include_usage_adds_one_event_without_choices(server: Server) -> None:
    *events, last = server.stream(PATH, "xy", "z", prompt="p", n=2, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events)
    assert (last["choices"], last["usage"]) == (
        *(
            [],
            usage(1, 3),
        ),
    )


def test_usage_says_how_much_of_the_prompts_was_in_the_cache(server: Server) -> None:
    """Once for each prompt, however many replies are made to it."""
    server.cached_tokens = 2
    reply = server.say(PATH, "A", "B", "C", "D", prompt=["abc", "abcd"], n=2)
    assert reply["usage"] == usage(7, 4, cached_tokens=4)
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, *_, last = server.stream(PATH, "xy", prompt="abc", stream_options=options)
    assert first["usage"] == usage(3, 1, cached_tokens=2)
    assert last["usage"] == usage(3, 2, cached_tokens=2)


def test_continuous_usage_counts_on_every_event(server: Server) -> None:
    events = server.stream(PATH, "xy", prompt="p", stream_options={"continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 2]


def test_continuous_usage_counts_the_prompt_that_a_choice_belongs_to(server: Server) -> None:
    body: dict[str, Any] = {"prompt": ["p", "qrs"], "n": 2, "stream_options": {"continuous_usage_stats": True}}
    events = server.stream(PATH, "a", "b", "c", "d", **body)
    counted = {(event["choices"][0]["index"], event["usage"]["prompt_tokens"]) for event in events}
    assert counted == {(0, 1), (1, 1), (2, 3), (3, 3)}
