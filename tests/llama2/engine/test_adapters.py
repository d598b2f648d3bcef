"""Requests with adapters: each computes as if its adapter were the model, whoever else is there, and slots are few."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import Base, read_adapter, write_adapter
from llama2.adapters.reference import AdapterRef
from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Errand, Output, Request
from llama2.errors import InvalidValue
from llama2.llm import LLM
from llama2.weights.certificate import Identity
from llama2.weights.manifest import Manifest
from llama2.weights.origin import SORTED, write_origin
from tests.support.adapters import merged, random_pairs, write_random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

ARGS = tiny_args(vocab_size=512, n_kv_heads=2)
GREEDY = SamplingParams(temperature=0, max_new_tokens=12, ignore_eos=True)
PROMPT = tuple(range(20, 60))
OPTIONS: dict[str, Any] = {"max_seq_len": 96, "max_batch_size": 4, "max_loras": 2, "seed": 3}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [write_random_adapter(folder / str(seed), ARGS, seed, r=2 + seed) for seed in range(5)]


def make_engine(folder: Path, **options: Any) -> Engine:
    return load_engine(folder, config=EngineConfig(**{**OPTIONS, **options}))


def drain(engine: Engine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
    assert not engine.has_work
    assert engine.stats().free_blocks == engine.stats().total_blocks
    return outputs


def ids_of(outputs: list[Output]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def ask(name: str, adapter: Path | None, params: SamplingParams = GREEDY) -> Request:
    ref = None if adapter is None else AdapterRef.of(adapter)
    return Request(request_id=name, prompt_ids=PROMPT, params=params, adapter=ref)


def test_more_adapters_than_slots_each_reply_is_that_of_the_merged_model(
    folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    engine = make_engine(folder)
    for index, adapter in enumerate([None, *adapters, None, *adapters]):
        engine.add(ask(str(index), adapter))
    replies = {name: ids_of(outputs) for name, outputs in drain(engine).items()}
    weights = random_weights(ARGS)
    tokenizer = tiny_sentencepiece(tmp_path, vocab_size=512)
    for index, adapter in enumerate([None, *adapters]):
        whole = weights
        if adapter is not None:
            config = AdapterConfig.load(adapter)
            whole = merged(weights, random_pairs(config, ARGS, seed=index - 1))
        alone = make_engine(write_checkpoint(tmp_path / f"merged{index}", ARGS, whole, tokenizer), max_loras=0)
        alone.add(ask("alone", None))
        expected = ids_of(drain(alone)["alone"])
        assert replies[str(index)] == replies[str(index + 6)] == expected
    assert len({tuple(ids) for ids in replies.values()}) == 6


def test_logits_are_those_of_the_merged_model(folder: Path, adapters: list[Path], tmp_path: Path) -> None:
    whole = merged(random_weights(ARGS), random_pairs(AdapterConfig.load(adapters[3]), ARGS, seed=3))
    expected = LLM(write_checkpoint(tmp_path / "merged", ARGS, whole, tiny_sentencepiece(tmp_path, vocab_size=512)))
    ours = LLM(folder, max_loras=1)
    torch.testing.assert_close(ours.score(PROMPT, adapter=adapters[3]), expected.score(PROMPT), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours.score(PROMPT), expected.score(PROMPT), atol=0.1)


def test_a_prefix_is_shared_by_requests_of_one_adapter_alone(folder: Path, adapters: list[Path]) -> None:
    engine = make_engine(folder)
    cached = []
    for turn, adapter in enumerate([None, adapters[0], adapters[1], adapters[0], None]):
        engine.add(ask(str(turn), adapter))
        cached.append(drain(engine)[str(turn)][0].cached_tokens)
    assert cached == [0, 0, 0, 32, 32]


def test_a_reload_under_the_same_name_never_meets_old_blocks(folder: Path, tmp_path: Path) -> None:
    engine = make_engine(folder)
    place = write_random_adapter(tmp_path / "mine", ARGS, 1)
    engine.add(ask("first", place))
    first = drain(engine)["first"]
    write_random_adapter(place, ARGS, 2)
    engine.add(ask("second", place))
    second = drain(engine)["second"]
    assert second[0].cached_tokens == 0
    assert ids_of(second) != ids_of(first)
    write_random_adapter(place, ARGS, 1)  # the same bytes as at first
    engine.add(ask("third", place))
    third = drain(engine)["third"]
    assert third[0].cached_tokens == 32
    assert ids_of(third) == ids_of(first)


def test_an_adapter_that_cannot_be_read_ends_its_own_requests_alone(
    folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    engine = make_engine(folder)
    damaged = write_random_adapter(tmp_path / "damaged", ARGS)
    (damaged / "adapter_model.safetensors").write_bytes(b"not what it was")
    wide = write_random_adapter(tmp_path / "wide", ARGS, r=17)
    for name, adapter in (("good", adapters[0]), ("damaged", damaged), ("base", None), ("wide", wide)):
        engine.add(ask(name, adapter, replace(GREEDY, n=2)))
    outputs = drain(engine)
    for name, problem in (("damaged", "safetensors"), ("wide", "rank 17, and max_lora_rank is 16")):
        assert [one.finish_reason for one in outputs[name]] == ["error", "error"]
        assert all(problem in one.problem for one in outputs[name])
    for name in ("good", "base"):
        assert len(ids_of(outputs[name])) == 24
    engine.add(ask("again", adapters[0]))
    assert ids_of(drain(engine)["again"]) == ids_of([one for one in outputs["good"] if one.index == 0])


def test_an_adapter_of_another_base_is_refused_by_its_hash(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    Manifest(base, {}).write()
    engine = make_engine(base)
    other = write_random_adapter(tmp_path / "other", ARGS)
    config, pairs = AdapterConfig.load(other), read_adapter(other, ARGS).pairs
    weights = Identity.of(base).weights
    for name, hashed in (("own", weights), ("other", "xxh3_128:0123")):
        write_adapter(tmp_path / name, pairs, config, ARGS, base=Base(weights=hashed, stored={"float32": 1}))
        engine.add(ask(name, tmp_path / name))
    outputs = drain(engine)
    assert outputs["own"][-1].finish_reason == "length"
    assert outputs["other"][-1].finish_reason == "error"
    assert "trained on another base" in outputs["other"][-1].problem


def test_an_adapter_is_refused_where_hidden_features_are_in_another_order(folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(folder, tmp_path / "base")
    write_origin(base, (SORTED,))
    engine = make_engine(base)
    engine.add(ask("one", write_random_adapter(tmp_path / "one", ARGS)))
    assert "hidden features these weights have in another order" in drain(engine)["one"][-1].problem


def test_without_max_loras_an_adapter_is_refused_with_what_to_set(folder: Path, adapters: list[Path]) -> None:
    with pytest.raises(InvalidValue, match="max_loras"):
        make_engine(folder, max_loras=0).add(ask("one", adapters[0]))


def test_unloading_waits_for_the_requests_that_run(folder: Path, adapters: list[Path]) -> None:
    engine = make_engine(folder)
    ref = AdapterRef.of(adapters[0])
    engine.run_errand(Errand(request_id="load", kind="load", adapter=ref))
    assert [one.finish_reason for one in drain(engine)["load"]] == ["stop"]
    engine.add(ask("runs", adapters[0]))
    engine.step()
    engine.run_errand(Errand(request_id="unload", kind="unload", adapter=ref))
    ended: list[str] = []
    while engine.has_work:
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert ended == ["runs", "unload"]
    assert not engine._adapters._held


def test_a_waiting_request_can_be_aborted(folder: Path, adapters: list[Path]) -> None:
    engine = make_engine(folder)
    engine.add(ask("one", adapters[0], replace(GREEDY, n=2)))
    assert engine.is_live("one")
    assert engine.stats().waiting == 1
    assert [(one.index, one.finish_reason) for one in engine.abort("one")] == [(0, "abort"), (1, "abort")]
    assert not engine.is_live("one")
    assert "one" not in drain(engine)


@pytest.mark.parametrize("seed", range(3))
def test_random_loads_unloads_and_requests(folder: Path, adapters: list[Path], seed: int) -> None:
    """All at once, with room for three on the host and for two on the device: each reply is what it is alone."""
    choose = random.Random(seed)
    engine = make_engine(folder, max_cpu_loras=3)
    expected = {}
    for adapter in (None, *adapters):
        engine.add(ask("alone", adapter))
        expected[adapter] = ids_of(drain(engine)["alone"])
    asked: dict[str, Path | None] = {}
    outputs: dict[str, list[Output]] = {}
    for index in range(200):
        what, adapter = choose.random(), choose.choice(adapters)
        if what < 0.6:
            asked[str(index)] = adapter if what < 0.5 else None
            engine.add(ask(str(index), asked[str(index)]))
        elif what < 0.8:
            kind: Literal["load", "unload"] = "load" if what < 0.7 else "unload"
            given = engine.run_errand(Errand(request_id=f"errand{index}", kind=kind, adapter=AdapterRef.of(adapter)))
            outputs.setdefault(f"errand{index}", []).extend(given)
        elif asked and what < 0.85:
            name = choose.choice(list(asked))
            outputs.setdefault(name, []).extend(engine.abort(name))
        for _ in range(choose.randrange(4)):
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            engine.check_integrity()
    for name, rest in drain(engine).items():
        outputs.setdefault(name, []).extend(rest)
    reasons = Counter(outputs[name][-1].finish_reason for name in outputs)
    assert reasons.keys() <= {"length", "abort", "stop"}
    for name, adapter in asked.items():
        if outputs[name][-1].finish_reason == "length":
            assert ids_of(outputs[name]) == expected[adapter]
    assert len(engine._adapters._held) <= 3
