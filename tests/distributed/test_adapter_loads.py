"""Adapters on several ranks: the same logits at every degree, and all ranks have an adapter or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llama2.adapters.reference import AdapterRef
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Errand, Output, Request
from llama2.llm import LLM
from tests.support.adapters import write_random_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.integration

# Cut at 2 ranks into heads of 4 and 2, at 6 each KV head is on two ranks; 80 = 27 + 27 + 26 hidden units at 3.
ARGS = tiny_args(vocab_size=512, n_heads=6, n_kv_heads=3, head_dim=8, hidden_dim=80)
PROMPT = list(range(20, 50))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "model", ARGS, random_weights(ARGS), tiny_sentencepiece(folder, vocab_size=512))
    for seed in range(3):
        write_random_adapter(folder / str(seed), ARGS, seed, r=3 + seed)
    return folder


def score(folder: Path) -> list[torch.Tensor]:
    llm = LLM(folder / "model", max_seq_len=64, max_loras=2)
    scores = [llm.score(PROMPT, adapter=adapter) for adapter in (None, *(folder / str(seed) for seed in range(3)))]
    llm.close()
    return scores


def test_logits_are_the_same_at_every_degree(folders: Path) -> None:
    (alone,) = run_ranks(1, score, folders)
    assert all((one - alone[0]).abs().max() > 0.1 for one in alone[1:])
    for degree in (2, 3, 6):
        for ours, expected in zip(run_ranks(degree, score, folders)[0], alone, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def load_where_one_rank_cannot(folder: Path) -> Any:
    rank = dist.get_rank()
    os.chdir(folder if rank != 1 else folder / "model")
    llm = LLM(folder / "model", max_seq_len=64, max_loras=2)
    engine = llm._engine
    if rank != 0:
        engine.close()
        return sorted(ref.path for ref in engine._group._runner._store._shares)
    outputs: list[Output] = []
    for name in ("1", str(folder / "2")):
        ref = AdapterRef(path=name, stamp=())
        outputs += engine.run_errand(Errand(request_id=name, kind="load", adapter=ref))
        while engine.has_work:
            outputs += engine.step()
    params = SamplingParams(temperature=0, max_new_tokens=3)
    ref = AdapterRef(path=str(folder / "2"), stamp=())
    engine.add(Request(request_id="asks", prompt_ids=tuple(PROMPT), params=params, adapter=ref))
    while engine.has_work:
        outputs += engine.step()
    engine.check_integrity()
    engine.close()
    return outputs, sorted(ref.path for ref in engine._group._runner._store._shares)


def test_where_one_rank_cannot_read_an_adapter_no_rank_has_it(folders: Path) -> None:
    (outputs, held), others = run_ranks(2, load_where_one_rank_cannot, folders)
    failed, loaded, *reply = outputs
    assert failed.finish_reason == "error"
    assert failed.problem.startswith("rank 1: ")
    assert "adapter_config.json" in failed.problem
    assert loaded.finish_reason == "stop"
    assert sum(len(output.token_ids) for output in reply) == 3
    assert held == others == [str(folders / "2")]
