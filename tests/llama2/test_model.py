"""The model computes what transformers' LlamaForCausalLM computes, however its prompt is cut into steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2 import LLM, SamplingParams
from llama2.engine import loading
from llama2.model import rotary_table
from tests.support.checkpoints import write_checkpoint
from tests.support.reference import reference_model
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

ARCHITECTURES = {
    "MHA": {"n_kv_heads": 8},
    "GQA": {"n_kv_heads": 2},
    "odd heads": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
    "ffn_dim_multiplier": {"ffn_dim_multiplier": 1.3, "multiple_of": 32},
    "theta 1e6": {"rope_theta": 1e6},
    "head_dim apart from dim": {"head_dim": 16},
    "norm_eps": {"norm_eps": 1e-2},
}


# top_p=1: a nucleus ends between two tokens that may be equal up to rounding.
SAMPLED = SamplingParams(temperature=1.0, top_p=1.0, seed=5)


def ids(count: int, *, seed: int = 0, vocab_size: int = 512) -> list[int]:
    return torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentencepiece(tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    args = tiny_args(vocab_size=512)
    return write_checkpoint(tmp_path_factory.mktemp("tiny"), args, random_weights(args), tokenizer_file)


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_logits_equal_transformers(tmp_path: Path, tokenizer_file: Path, changes: dict[str, object]) -> None:
    args = tiny_args(vocab_size=512, **changes)
    weights = random_weights(args)
    llm = LLM(write_checkpoint(tmp_path, args, weights, tokenizer_file), max_seq_len=128)
    prompt = ids(100)
    with torch.no_grad():
        expected = reference_model(args, weights)(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(llm.score(prompt), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_step_tokens", [1, 7, 16, 64])
def test_prefill_in_chunks_equals_prefill_whole(tiny: Path, max_step_tokens: int) -> None:
    prompt = ids(90)
    whole = LLM(tiny, max_seq_len=128, max_step_tokens=128).score(prompt)
    chunked = LLM(tiny, max_seq_len=128, max_batch_size=1, max_step_tokens=max_step_tokens).score(prompt)
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=0)


def test_the_block_size_does_not_matter(tiny: Path) -> None:
    prompt = ids(90)
    expected = LLM(tiny, max_seq_len=128, block_size=128).score(prompt)
    torch.testing.assert_close(LLM(tiny, max_seq_len=128, block_size=3).score(prompt), expected, atol=1e-5, rtol=0)


def test_decode_equals_prefill(tiny: Path) -> None:
    """Each generated token's log-probability is the one that scoring the finished text gives."""
    llm = LLM(tiny, max_seq_len=128)
    prompt = ids(20)
    (reply,) = llm.generate([prompt], SamplingParams(max_new_tokens=60, logprobs=3, ignore_eos=True, seed=1))
    assert reply.logprobs is not None
    assert len(reply.token_ids) == 60
    expected = llm.score(prompt + reply.token_ids)[19:-1].log_softmax(-1)
    for position, (token_id, one) in enumerate(zip(reply.token_ids, reply.logprobs, strict=True)):
        assert one.token_id == token_id
        assert one.logprob == pytest.approx(expected[position, token_id].item(), abs=1e-5)
        values, indices = expected[position].topk(3)
        assert [index for index, _ in one.top] == indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_a_batch_of_one_equals_a_batch_of_many(tiny: Path) -> None:
    """Greedy and seeded replies alike do not depend on others in the batch."""
    prompts = [ids(length, seed=length) for length in (1, 3, 16, 17, 40, 70)]
    params = [replace(SAMPLED, max_new_tokens=30, temperature=index % 2, seed=index) for index in range(len(prompts))]
    llm = LLM(tiny, max_seq_len=128, max_batch_size=8, max_step_tokens=32)
    together = llm.generate(prompts, params)
    alone = [llm.generate([prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    assert together == alone


def test_preempted_equals_not_preempted(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [ids(30, seed=seed) for seed in range(6)]
    params = replace(SAMPLED, max_new_tokens=60, ignore_eos=True)
    roomy = LLM(tiny, max_seq_len=96, max_batch_size=6)
    monkeypatch.setattr(loading, "count_blocks", lambda *args, **kwargs: 9)  # of 36: one and a half sequences
    tight = LLM(tiny, max_seq_len=96, max_batch_size=6)
    with caplog.at_level("DEBUG", logger="llama2.engine.scheduler"):
        assert tight.generate(prompts, params) == roomy.generate(prompts, params)
    assert "preempted" in caplog.text


def test_the_prefix_cache_saves_work_and_changes_nothing(tiny: Path) -> None:
    start = ids(50)
    prompts = [start + ids(length, seed=length) for length in (1, 5, 20)] + [start, start[:40]]
    params = replace(SAMPLED, max_new_tokens=20)
    cached, uncached = (LLM(tiny, max_seq_len=128, prefix_cache=known) for known in (True, False))
    expected = [uncached.generate([prompt], params)[0] for prompt in prompts]
    assert [cached.generate([prompt], params)[0] for prompt in prompts] == expected
    assert cached.generate(prompts, params) == expected
    assert uncached._engine.stats().cached_tokens == 0
    # Alone: 3 blocks for each but the first and the shortest, which has 2; together: the same, and the first's own.
    assert cached._engine.stats().cached_tokens >= 16 * (3 * 3 + 2 + 3 * 4 + 2)


def test_rope_scaling_divides_positions() -> None:
    plain = rotary_table(tiny_args(), 64, torch.device("cpu"))
    stretched = rotary_table(tiny_args(rope_scaling=2.0), 128, torch.device("cpu"))
    assert torch.equal(stretched[::2], plain)


def test_an_engine_stretches_positions_as_it_is_asked(tmp_path: Path, tokenizer_file: Path) -> None:
    """As a model that was trained on stretched ones."""
    weights = random_weights(tiny_args(vocab_size=512))
    logits = []
    for scaling, option in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0)):
        args = tiny_args(vocab_size=512, rope_scaling=scaling)
        folder = write_checkpoint(tmp_path / f"{scaling} {option}", args, weights, tokenizer_file)
        with LLM(folder, max_seq_len=32, rope_scaling=option) as llm:
            logits.append(llm.score([5, 6, 7]))
    own, asked, neither = logits
    assert torch.equal(own, asked)
    assert not torch.allclose(own, neither)
