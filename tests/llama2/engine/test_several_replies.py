"""Several replies to one prompt, what is known of the prompt itself, and what may not be said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2.config import EngineConfig
from llama2.engine import loading
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Output, Request
from tests.support.weights import tiny_args

ARGS = tiny_args(vocab_size=512)
PROMPT = tuple(range(20, 57))  # two blocks of 16, and 5 tokens of a third
PARAMS = SamplingParams(temperature=1.0, top_p=1.0, seed=7, max_new_tokens=20, ignore_eos=True)


def make(folder: Path, *, max_step_tokens: int = 64) -> Engine:
    config = EngineConfig(max_seq_len=96, max_batch_size=4, max_step_tokens=max_step_tokens)
    return load_engine(folder, config=config)


def run(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[Output]]:
    for request in requests:
        engine.add(request)
    outputs: dict[tuple[str, int], list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine._scheduler.check_integrity()
    engine.check_integrity()
    assert engine.stats().free_blocks == engine.stats().total_blocks
    return outputs


def ids(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def replies(engine: Engine, n: int) -> list[list[int]]:
    outputs = run(engine, Request(request_id="r", prompt_ids=PROMPT, params=replace(PARAMS, n=n)))
    assert [outputs["r", index][-1].finish_reason for index in range(n)] == ["length"] * n
    return [ids(outputs["r", index]) for index in range(n)]


def test_the_first_of_several_replies_is_the_only_reply(folder: Path) -> None:
    engine = make(folder)
    several = replies(engine, 3)
    assert several[0] == replies(engine, 1)[0]
    assert len({tuple(reply) for reply in several}) == 3
    assert several == replies(engine, 3)


def test_replies_share_the_blocks_of_their_prompt_and_copy_what_they_write_into(folder: Path) -> None:
    engine = make(folder)
    engine.add(Request(request_id="r", prompt_ids=PROMPT, params=replace(PARAMS, n=4)))
    engine.step()
    total = engine.stats().total_blocks
    assert total - engine.stats().free_blocks == 3
    engine.step()
    assert total - engine.stats().free_blocks == 2 + 4
    while engine.has_work:
        engine.step()
    engine.check_integrity()


def test_a_reply_does_not_depend_on_sharing_nor_on_preemption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = replies(make(folder), 4)
    assert replies(make(folder, max_step_tokens=5), 4) == expected  # the prompt in pieces
    monkeypatch.setattr(loading, "count_blocks", lambda *args, **kwargs: 7)
    assert replies(make(folder), 4) == expected  # 4 replies of 57 tokens need 2 + 4 * 2


def test_places_in_the_batch_are_kept_for_all_replies(folder: Path) -> None:
    engine = make(folder)
    engine.add(Request(request_id="one", prompt_ids=PROMPT, params=replace(PARAMS, n=3)))
    engine.add(Request(request_id="two", prompt_ids=PROMPT, params=replace(PARAMS, n=2)))
    while engine.has_work:
        engine.step()
        assert engine.stats().running <= 4
    with pytest.raises(ValueError, match="n must be at most max_batch_size=4, got 5"):
        engine.add(Request(request_id="many", prompt_ids=PROMPT, params=SamplingParams(n=5)))


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_ends_all_replies(folder: Path, steps: int) -> None:
    engine = make(folder)
    engine.add(Request(request_id="r", prompt_ids=PROMPT, params=replace(PARAMS, n=3)))
    for _ in range(steps):
        engine.step()
    assert {output.finish_reason for output in engine.abort("r")} == {"abort"}
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks
    engine.check_integrity()


@pytest.mark.parametrize("max_step_tokens", [5, 64])
def test_the_prompts_own_logprobs_are_those_of_its_scores(folder: Path, max_step_tokens: int) -> None:
    engine = make(folder, max_step_tokens=max_step_tokens)
    score = Request(request_id="score", prompt_ids=PROMPT, score=True, generate=False)
    expected = run(engine, score)["score", 0][-1].prompt_logits.log_softmax(-1)
    scored = Request(request_id="scored", prompt_ids=PROMPT, params=PARAMS, prompt_logprobs=2, generate=False)
    outputs = run(engine, scored, Request(request_id="beside", prompt_ids=PROMPT, params=PARAMS))
    (output,) = outputs["scored", 0]
    assert (output.finish_reason, output.token_ids) == ("length", ())
    first, *others = output.prompt_logprobs
    assert first is None
    assert len(others) == len(PROMPT) - 1
    for position, one in enumerate(others):
        assert one is not None
        assert one.token_id == PROMPT[position + 1]
        assert one.logprob == pytest.approx(expected[position, one.token_id].item(), abs=1e-5)
        assert [index for index, _ in one.top] == expected[position].topk(2).indices.tolist()


def test_a_reply_with_prompt_logprobs_is_the_reply_without(folder: Path) -> None:
    engine = make(folder)
    request = Request(request_id="r", prompt_ids=PROMPT, params=PARAMS, prompt_logprobs=0)
    outputs = run(engine, request)["r", 0]
    assert len(outputs[0].prompt_logprobs) == len(PROMPT)
    assert not any(output.prompt_logprobs for output in outputs[1:])
    assert ids(outputs) == replies(engine, 1)[0]


def test_prompt_logprobs_come_with_a_reply_that_ends_on_its_first_token(folder: Path) -> None:
    params = replace(PARAMS, max_new_tokens=1)
    request = Request(request_id="r", prompt_ids=PROMPT, params=params, prompt_logprobs=0)
    (output,) = run(make(folder), request)["r", 0]
    assert (len(output.prompt_logprobs), len(output.token_ids)) == (len(PROMPT), 1)


@pytest.mark.parametrize("length", [1, 6])
def test_a_chunk_that_holds_the_last_position_alone_has_nothing_to_score(folder: Path, length: int) -> None:
    request = Request(request_id="r", prompt_ids=PROMPT[:length], prompt_logprobs=1, generate=False)
    (output,) = run(make(folder, max_step_tokens=5), request)["r", 0]
    assert [one and one.token_id for one in output.prompt_logprobs] == [None, *PROMPT[1:length]]


def test_a_logit_bias_makes_and_forbids_tokens(folder: Path) -> None:
    engine = make(folder)
    greedy = replace(PARAMS, temperature=0)
    plain = ids(run(engine, Request(request_id="r", prompt_ids=PROMPT, params=greedy))["r", 0])
    forced = replace(greedy, logit_bias={99: 100.0}, logprobs=0)
    outputs = run(engine, Request(request_id="r", prompt_ids=PROMPT, params=forced))["r", 0]
    assert ids(outputs) == [99] * 20
    assert outputs[0].logprobs[0].logprob < -1, "logprobs are the model's own"
    without = replace(greedy, logit_bias=dict.fromkeys(plain, -100.0))
    assert not set(plain) & set(ids(run(engine, Request(request_id="r", prompt_ids=PROMPT, params=without))["r", 0]))
    with pytest.raises(ValueError, match="logit_bias must hold token ids from 0 to 511, got 512"):
        engine.add(Request(request_id="r", prompt_ids=PROMPT, params=replace(greedy, logit_bias={512: 1.0})))


class Exactly:
    """A grammar of one sentence, in token ids; then EOS."""

    failed = False
    source = "in no other process"

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.token_ids = list(token_ids)

    def matcher(self, *, continues_prompt: bool) -> Exactly:
        return Exactly(self.token_ids)

    def mask_W(self) -> torch.Tensor:
        word, bit = divmod(self.token_ids[0], 32)
        return torch.zeros(16, dtype=torch.int64).index_fill_(0, torch.tensor([word]), 1 << bit).to(torch.int32)

    def accept(self, token_id: int) -> None:
        assert token_id == self.token_ids.pop(0)


class GivenUp(Exactly):
    """A grammar that is too costly to follow to the end of the sentence: then EOS is all that is left."""

    def matcher(self, *, continues_prompt: bool) -> GivenUp:
        return GivenUp(self.token_ids)

    def mask_W(self) -> torch.Tensor:
        self.failed = len(self.token_ids) == 1
        return super().mask_W()


def test_a_reply_that_could_not_be_held_to_its_grammar_is_an_error(folder: Path) -> None:
    request = Request(request_id="r", prompt_ids=PROMPT, params=PARAMS, grammar=GivenUp([100, 101, 2]))
    outputs = run(make(folder), request)["r", 0]
    assert [output.finish_reason for output in outputs] == [None, None, "error"]


def test_a_grammar_is_kept_by_every_reply_also_after_preemption(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "count_blocks", lambda *args, **kwargs: 7)
    engine = make(folder)
    sentence = list(range(100, 115))
    request = Request(request_id="r", prompt_ids=PROMPT, params=replace(PARAMS, n=3), grammar=Exactly([*sentence, 2]))
    free = Request(request_id="free", prompt_ids=PROMPT, params=PARAMS)
    outputs = run(engine, request, free)
    for index in range(3):
        assert ids(outputs["r", index]) == [*sentence, 2]
        assert outputs["r", index][-1].finish_reason == "stop", "EOS ends a grammar, though ignore_eos is set"
    assert ids(outputs["free", 0]) == replies(engine, 1)[0]
