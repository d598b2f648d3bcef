"""A GPU's memory is divided up before any of it is used. How much it has is faked here."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2 import kv_cache
from llama2.config import EngineConfig, ModelArgs
from llama2.kv_cache import bytes_per_block, choose_batch_size, count_blocks
from llama2.machine.memory_plan import MIB, describe, reserve

LLAMA_7B = ModelArgs.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32}, vocab_size=32000)
LLAMA_70B = ModelArgs.from_params(
    {"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
    vocab_size=32000,
)
CONFIG = EngineConfig(max_seq_len=4096, max_batch_size=64, max_step_tokens=1024)
GPU = torch.device("cuda", 0)
BF16 = torch.bfloat16


def test_each_name_has_the_bytes_that_follow_from_the_settings() -> None:
    reserved = reserve(LLAMA_7B, CONFIG, dtype=BF16, degree=1)
    features = 4 * 4096 + 3 * 4096 + 2 * 4096 + 3 * 11008
    assert reserved["activations"] == 1024 * (2 * features + 4 * 128 + 64)
    assert reserved["attention"] == 64 * 32 * 16 * (128 + 2) * 4  # 16 pieces of 256 positions
    assert reserved["logits"] == 64 * 32000 * (2 + 2 + 4)
    assert reserved["logits of prompts"] == 1024 * 32000 * (2 + 2 + 4 + 4)
    # Its pool holds what a pass of 512 tokens computes in between.
    assert reserved["CUDA graphs"] > reserved["activations"] / 2 + reserved["attention"] + reserved["logits"]
    assert 1000 * MIB < sum(reserved.values()) < 2000 * MIB


def test_70b_on_eight_gpus_needs_an_eighth_of_what_is_split() -> None:
    alone, shared = (reserve(LLAMA_70B, CONFIG, dtype=BF16, degree=degree) for degree in (1, 8))
    assert shared["attention"] == alone["attention"] / 8
    assert alone["activations"] / 8 < shared["activations"] < alone["activations"] / 2
    assert shared["logits"] == alone["logits"]
    assert ("NCCL" in shared, "NCCL" in alone) == (True, False)


def test_without_recordings_nothing_is_reserved_for_them() -> None:
    assert "CUDA graphs" not in reserve(LLAMA_7B, replace(CONFIG, cuda_graphs=False), dtype=BF16, degree=1)


def test_uneven_shares_are_counted_where_they_are_largest() -> None:
    """32 heads on 3 GPUs are 11, 11 and 10."""
    assert reserve(LLAMA_7B, CONFIG, dtype=BF16, degree=3)["attention"] == 64 * 11 * 16 * (128 + 2) * 4


BLOCK = bytes_per_block(LLAMA_7B, block_size=16, n_kv_heads=32, dtype=BF16)
RESERVED = reserve(LLAMA_7B, CONFIG, dtype=BF16, degree=1)
TOTAL = sum(RESERVED.values())


def count(monkeypatch: pytest.MonkeyPatch, free: int, *, rank: int = 0, **changes: object) -> int:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 << 30))
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    return count_blocks(LLAMA_7B, config, n_kv_heads=32, dtype=BF16, device=GPU, rank=rank, degree=1)


def test_without_a_fraction_nine_tenths_of_what_is_left_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    free = TOTAL + (40 << 30)
    assert count(monkeypatch, free) == count(monkeypatch, free, kv_memory_fraction=0.9)


@pytest.mark.parametrize(
    ("free_gib", "max_step_tokens", "size"),
    [(60, 512, 64), (60, 16, 16), (12, 512, 16), (3.5, 512, 4), (150, 512, 256)],
)
def test_the_batch_is_as_large_as_a_quarter_of_the_longest_sequence_each_allows(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, max_step_tokens: int, size: int
) -> None:
    """Of 7B in bf16 a quarter of 4096 positions is half a GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * 2**30), 141 << 30))
    config = EngineConfig(max_seq_len=4096, max_step_tokens=max_step_tokens)
    chosen = choose_batch_size(LLAMA_7B, config, n_kv_heads=32, dtype=BF16, device=GPU)
    assert chosen == size
    config = replace(config, max_batch_size=chosen)
    left = free_gib * 2**30 - sum(reserve(LLAMA_7B, config, dtype=BF16, degree=1).values())
    assert 0.9 * left > chosen / 4 * 256 * BLOCK


def test_on_a_cpu_the_kv_cache_is_bounded_by_what_it_can_use_and_by_a_quarter_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, config = torch.device("cpu"), EngineConfig(max_seq_len=4096)
    for free_gib, batch, blocks in ((1000, 32, 32 * 256), (24, 8, 767), (8, 2, 255)):
        monkeypatch.setattr(kv_cache, "free_memory", lambda device, free=free_gib: free << 30)
        sizes = {"n_kv_heads": 32, "dtype": BF16, "device": cpu}
        assert choose_batch_size(LLAMA_7B, config, **sizes) == batch  # type: ignore[arg-type]
        if blocks >= 256:
            assert count_blocks(LLAMA_7B, replace(config, max_batch_size=batch), **sizes) == blocks  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kv_memory_fraction=0.25 of 8.0 GiB holds 255 blocks .* needs 256"):
        count_blocks(LLAMA_7B, replace(config, max_batch_size=4), **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.5, 0.9, 1.0])
def test_a_fraction_is_of_what_is_left(monkeypatch: pytest.MonkeyPatch, fraction: float) -> None:
    left = 40 << 30
    blocks = count(monkeypatch, TOTAL + left, kv_memory_fraction=fraction)
    assert (blocks + 1) * BLOCK <= fraction * left < (blocks + 2) * BLOCK


@pytest.mark.parametrize("free", [TOTAL - 1, TOTAL + 255 * BLOCK])
def test_room_for_no_sequence_names_all_reservations(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    with pytest.raises(ValueError, match="but one sequence of max_seq_len=4096 needs 256") as caught:
        count(monkeypatch, free, kv_memory_fraction=1.0)
    assert describe(RESERVED) in str(caught.value)


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_one_rank_says_once_what_is_reserved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int, lines: int
) -> None:
    with caplog.at_level(logging.INFO):
        count(monkeypatch, 79 << 30, rank=rank, kv_memory_fraction=0.9)
    assert len(caplog.messages) == lines
    assert all(describe(RESERVED) in message for message in caplog.messages)


@pytest.mark.integration
def test_a_machine_that_serves_from_gpus_needs_no_psutil() -> None:
    modules = "llama2, llama2.engine.engine, handler.torchserve.llama_handler"
    code = f"import sys; sys.modules['psutil'] = None; import {modules}"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
