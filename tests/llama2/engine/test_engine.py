"""The engine's loop on a small random model: what ends a request, what joins and leaves, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Output, Request
from tests.support.weights import tiny_args

ARGS = tiny_args(vocab_size=512)
GREEDY = SamplingParams(temperature=0, max_new_tokens=40, ignore_eos=True)
PROMPT = tuple(range(20, 40))


def request(name: str, params: SamplingParams = GREEDY, prompt: tuple[int, ...] = PROMPT) -> Request:
    return Request(request_id=name, prompt_ids=prompt, params=params)


def drain(engine: Engine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    engine.check_integrity()
    assert engine.stats().free_blocks == engine.stats().total_blocks
    return outputs


def run(engine: Engine, params: SamplingParams) -> tuple[str, list[int], str | None]:
    engine.add(request("one", params))
    outputs = drain(engine)["one"]
    ids = [token_id for output in outputs for token_id in output.token_ids]
    return "".join(output.text for output in outputs), ids, outputs[-1].finish_reason


def with_changes(**changes: Any) -> SamplingParams:
    return replace(GREEDY, **changes)


def test_a_reply_ends_at_max_new_tokens(engine: Engine) -> None:
    _, ids, reason = run(engine, with_changes(max_new_tokens=7))
    assert (len(ids), reason) == (7, "length")


def test_a_reply_ends_where_max_seq_len_does(engine: Engine) -> None:
    _, ids, reason = run(engine, with_changes(max_new_tokens=None))
    assert (len(PROMPT) + len(ids), reason) == (96, "length")


def test_a_stop_id_ends_the_reply_and_is_not_in_its_text(engine: Engine) -> None:
    text, ids, _ = run(engine, GREEDY)
    place = next(index for index in range(5, 40) if ids[index] not in ids[:index])
    shorter, shorter_ids, reason = run(engine, with_changes(stop_token_ids=(ids[place],)))
    assert shorter_ids == ids[: place + 1]
    assert reason == "stop"
    assert text.startswith(shorter)
    assert shorter == engine.tokenizer.decode([3, *ids[:place]])[len(engine.tokenizer.decode([3])) :]


def test_eos_ends_the_reply_unless_ignored(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ids, _ = run(engine, GREEDY)
    monkeypatch.setattr(engine.tokenizer, "eos_ids", frozenset({ids[9]}))
    first = ids.index(ids[9])
    assert run(engine, with_changes(ignore_eos=False))[1:] == (ids[: first + 1], "stop")
    assert run(engine, GREEDY)[1:] == (ids, "length")


def test_no_stop_id_is_chosen_before_min_tokens(engine: Engine) -> None:
    _, ids, _ = run(engine, GREEDY)
    first = ids.index(ids[5])
    params = with_changes(stop_token_ids=(ids[5],), ignore_eos=False)
    assert len(run(engine, params)[1]) == first + 1
    _, longer, reason = run(engine, with_changes(stop_token_ids=(ids[5],), ignore_eos=False, min_tokens=20))
    assert longer[:first] == ids[:first]
    assert ids[5] not in longer[:20]
    assert len(longer) >= 20
    assert reason in ("stop", "length")


def test_a_stop_string_across_tokens_ends_the_reply_and_no_part_of_it_is_shown(engine: Engine) -> None:
    text, ids, _ = run(engine, GREEDY)
    for start in range(5, len(text) - 12, 5):
        stop = text[start : start + 6]
        engine.add(request("one", with_changes(stop=(stop,))))
        outputs = drain(engine)["one"]
        assert "".join(output.text for output in outputs) == text[: text.index(stop)]
        assert outputs[-1].finish_reason == "stop"
        assert sum(len(output.token_ids) for output in outputs) <= len(ids)


def test_requests_join_and_leave_at_every_step(engine: Engine) -> None:
    """Ten requests on four places: each gets exactly what it gets alone."""
    names = [f"request {index}" for index in range(10)]
    prompts = {name: tuple(range(10, 12 + 3 * index)) for index, name in enumerate(names)}
    outputs: dict[str, list[int]] = {name: [] for name in names}
    pending = list(names)
    while pending or engine.has_work:
        if pending:
            name = pending.pop(0)
            engine.add(request(name, with_changes(max_new_tokens=3 + len(pending)), prompts[name]))
        for output in engine.step():
            outputs[output.request_id] += output.token_ids
        assert engine.stats().running <= 4
    engine.check_integrity()
    for index, name in enumerate(names):
        engine.add(request(name, with_changes(max_new_tokens=12 - index), prompts[name]))
        assert [token for output in drain(engine)[name] for token in output.token_ids] == outputs[name]


def test_abort_frees_everything_at_once(engine: Engine) -> None:
    for name in ("a", "b", "c", "d", "waits"):
        engine.add(request(name))
    for _ in range(3):
        engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (4, 1)
    outputs = [output for name in ("a", "b", "c", "d", "waits", "unknown") for output in engine.abort(name)]
    assert {output.request_id: output.finish_reason for output in outputs} == dict.fromkeys(
        ["a", "b", "c", "d", "waits"], "abort"
    )
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks
    engine.check_integrity()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (request("x", prompt=()), r"prompt_ids must have from 1 to 95 tokens, got 0: max_seq_len is 96"),
        (request("x", prompt=tuple(range(96))), r"prompt_ids must have from 1 to 95 tokens, got 96"),
        (request("x", prompt=(1, 512)), r"prompt_ids must hold token ids from 0 to 511, got 512"),
        (
            request("x", with_changes(stop_token_ids=(600,))),
            r"stop_token_ids must hold token ids from 0 to 511, got 600",
        ),
    ],
)
def test_a_request_that_can_never_run_is_refused_and_leaves_nothing(
    engine: Engine, wrong: Request, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add(wrong)
    assert not engine.has_work


def test_a_live_request_id_is_refused_and_free_again_afterwards(engine: Engine) -> None:
    engine.add(request("same"))
    with pytest.raises(ValueError, match="'same' twice"):
        engine.add(request("same"))
    drain(engine)
    engine.add(request("same"))
    assert drain(engine)["same"][-1].finish_reason == "length"


def test_the_longest_prompt_that_is_taken_gets_one_token(engine: Engine) -> None:
    engine.add(request("long", prompt=tuple(range(95))))
    (output,) = drain(engine)["long"]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_seedless_requests_repeat_with_the_engines_seed_and_differ_from_each_other(folder: Path) -> None:
    def replies(seed: int) -> list[list[int]]:
        engine = load_engine(folder, config=EngineConfig(max_seq_len=96, max_batch_size=4, seed=seed))
        for name in ("a", "b"):
            engine.add(request(name, with_changes(temperature=1.0)))
        outputs = drain(engine)
        return [[token for output in outputs[name] for token in output.token_ids] for name in ("a", "b")]

    first = replies(3)
    assert first == replies(3)
    assert first[0] != first[1]
    assert first != replies(4)


def test_the_first_output_says_how_many_tokens_of_the_prompt_were_in_the_cache(engine: Engine) -> None:
    prompt = tuple(range(100, 150))
    several = Request(request_id="two", prompt_ids=prompt, params=with_changes(n=2))
    for one, cached in ((request("one", prompt=prompt), 0), (several, 48)):
        engine.add(one)
        outputs = drain(engine)[one.request_id]
        assert outputs[0].cached_tokens == sum(output.cached_tokens for output in outputs) == cached
    assert engine.stats().cached_tokens == 48
