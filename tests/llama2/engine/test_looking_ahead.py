"""An engine that plans a step before it reads the last one's tokens replies as one that reads them first.

A GPU works so. Here the engine is told to do it on a CPU, where the ids that the next step needs lie in the same place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.config import EngineConfig
from llama2.engine import runner as runner_module
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Output, Request
from llama2.text.grammar import GrammarCompiler
from tests.support.ranks import run_ranks
from tests.support.recordings import Rerun
from tests.support.weights import tiny_args

ARGS = tiny_args(vocab_size=512, n_kv_heads=2)
PARAMS = SamplingParams(temperature=1.0, top_p=0.95, max_new_tokens=30, ignore_eos=True)
# By request and index: ids, text, the reason to end, log-probabilities of the ids and of the prompt's.
Replies = dict[tuple[str, int], tuple[list[int], str, str | None, list[float]]]


def make(folder: Path, *, looks_ahead: bool, num_blocks: int | None = None) -> Engine:
    config = EngineConfig(max_seq_len=96, max_batch_size=6, max_step_tokens=24, seed=3)
    engine = load_engine(folder, config=config)
    if num_blocks is not None:
        engine = replace_blocks(engine, num_blocks)
    engine._looks_ahead = looks_ahead
    return engine


def replace_blocks(engine: Engine, num_blocks: int) -> Engine:
    return Engine(
        args=engine.args,
        config=engine.config,
        tokenizer=engine.tokenizer,
        group=engine._group,
        num_blocks=num_blocks,
        looks_ahead=False,
    )


def requests(engine: Engine) -> list[Request]:
    """One that ends by length, by an id, by a text; with penalties, a grammar, log-probabilities, several replies."""
    params = [
        replace(PARAMS, seed=1),
        replace(PARAMS, temperature=0, logprobs=2),
        replace(PARAMS, seed=2, stop_token_ids=tuple(range(100, 200))),
        replace(PARAMS, seed=3, stop=tuple("aeiou"), n=3),
        replace(PARAMS, seed=4, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
        replace(PARAMS, seed=5, logprobs=3, max_new_tokens=1),
        replace(PARAMS, seed=6, logit_bias={7: 4.0}, max_new_tokens=None),
        replace(PARAMS, seed=7, ignore_eos=False),
        PARAMS,
    ]
    options: dict[int, dict[str, Any]] = {
        1: {"prompt_logprobs": 2},
        7: {"grammar": GrammarCompiler(engine.tokenizer, ARGS.vocab_size).regex(r"[a-c]{3,40}")},
    }
    return [
        Request(
            request_id=f"request {index}",
            prompt_ids=tuple((7 * index + position) % 500 + 3 for position in range(1 + 9 * index % 40)),
            params=one,
            **options.get(index, {}),
        )
        for index, one in enumerate(params)
    ]


def replies(engine: Engine) -> Replies:
    """Of all requests, which join one by one while others run; one is dropped midway."""
    waiting = requests(engine)
    outputs: dict[tuple[str, int], list[Output]] = {}
    engine.add(replace(waiting[0], request_id="dropped"))
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        dropped = engine.abort("dropped") if len(waiting) == 3 else []
        for output in (*dropped, *engine.step()):
            outputs.setdefault((output.request_id, output.index), []).append(output)
        engine._scheduler.check_integrity()
    engine.check_integrity()
    assert engine.stats().free_blocks == engine.stats().total_blocks
    assert outputs.pop(("dropped", 0))[-1].finish_reason == "abort"
    return {
        key: (
            [token_id for output in some for token_id in output.token_ids],
            "".join(output.text for output in some),
            some[-1].finish_reason,
            [one.logprob for output in some for one in (*output.logprobs, *output.prompt_logprobs) if one],
        )
        for key, some in outputs.items()
    }


def assert_alike(ours: Replies, theirs: Replies) -> None:
    """Log-probabilities up to rounding: prompts are cut elsewhere, and products of other sizes round otherwise."""
    assert {key: reply[:3] for key, reply in ours.items()} == {key: reply[:3] for key, reply in theirs.items()}
    for key, reply in ours.items():
        assert reply[3] == pytest.approx(theirs[key][3], abs=1e-4)


def test_every_reply_is_the_same(folder: Path) -> None:
    ahead, at_once = (replies(make(folder, looks_ahead=looks_ahead)) for looks_ahead in (True, False))
    assert_alike(ahead, at_once)
    assert len(ahead) == 9 + 2
    assert {reason for _, _, reason, _ in ahead.values()} == {"stop", "length"}
    assert sum(len(logprobs) for _, _, _, logprobs in ahead.values()) == 1 + 30 + 9


def test_every_reply_is_the_same_where_sequences_are_preempted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="llama2.engine.scheduler")
    ahead = replies(make(folder, looks_ahead=True, num_blocks=9))
    assert "is preempted" in caplog.text
    assert_alike(ahead, replies(make(folder, looks_ahead=False)))


def test_the_next_step_is_on_its_way_before_the_tokens_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(folder, looks_ahead=True)
    events: list[str] = []

    def noted(event: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def call(argument: Any) -> Any:
            events.append(event)
            return function(argument)

        return call

    monkeypatch.setattr(engine._group._runner, "run", noted("run", engine._group._runner.run))
    monkeypatch.setattr(engine._scheduler, "update", noted("read", engine._scheduler.update))
    engine.add(Request(request_id="r", prompt_ids=(5, 6, 7), params=replace(PARAMS, max_new_tokens=4)))
    while engine.has_work:
        engine.step()
    assert events == ["run", "run", "read", "run", "read", "run", "read", "read"]


def test_no_step_takes_rows_by_a_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that copies from pageable memory: the host would wait for it, behind the step it looks ahead to.

    Rows are left over where a sequence ended while the next step was on its way, and told apart by what they ask for.
    """
    engine = make(folder, looks_ahead=True)
    by_list: list[Any] = []
    original = torch.Tensor.__getitem__

    def noted(self: torch.Tensor, index: Any) -> Any:
        by_list.extend(one for one in (index if isinstance(index, tuple) else (index,)) if isinstance(one, list))
        return original(self, index)

    monkeypatch.setattr(torch.Tensor, "__getitem__", noted)
    replies(engine)
    assert by_list == []


def replies_of_a_rank(folder: str, recorded: bool) -> Replies | None:
    if recorded:
        runner_module.choose_record = lambda device: Rerun
    engine = make(Path(folder), looks_ahead=True)
    if engine.rank != 0:
        engine.follow()
        return None
    found = replies(engine)
    engine.release()
    return found


@pytest.mark.integration
@pytest.mark.parametrize("recorded", [False, True])
def test_two_ranks_reply_as_one_does(folder: Path, recorded: bool) -> None:
    leads, follows = run_ranks(2, replies_of_a_rank, str(folder), recorded)
    assert follows is None
    assert_alike(leads, replies(make(folder, looks_ahead=False)))
