"""The Triton kernels compute what plain PyTorch computes: see tests/support/triton.py for where."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as functional

from llama2 import LLM, Completion, SamplingParams
from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import LARGEST_CODE
from llama2.machine import memory_plan
from tests.support.batches import BLOCK_SIZE, ragged_batch, random_cache
from tests.support.checkpoints import write_checkpoint
from tests.support.recordings import Rerun
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.triton import DEVICE, HALF, needs_triton
from tests.support.weights import random_weights, tiny_args

if TYPE_CHECKING:
    from llama2.kernels.cuda.kernels import CudaKernels

pytestmark = needs_triton

DTYPES = [torch.float32, HALF]
# Relative to values near 1: fp32 sums in another order, bf16 rounds to 8 bits and fp16 to 11.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CODES = pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
PLAIN = PlainKernels()


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1100, 7), (30, 41)])
def test_linear(kernels: CudaKernels, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype) / inputs**0.5
    assert_near(kernels.linear(x, weight), PLAIN.linear(x.float(), weight.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (1100, 14), (30, 42)])
def test_gated_linear(kernels: CudaKernels, dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> None:
    x, weight = randn(rows, inputs, dtype=dtype), randn(outputs, inputs, dtype=dtype) / inputs**0.5
    assert_near(kernels.gated_linear(x, weight), PLAIN.gated_linear(x.float(), weight.float()).to(dtype))


@pytest.mark.parametrize("inputs", [9000, 17000])
def test_products_of_every_width_have_tiles(kernels: CudaKernels, inputs: int) -> None:
    """Also those whose first tiles are fetched early, and whose last is cut."""
    x, weight = randn(2, inputs), randn(6, inputs) / inputs**0.5
    assert_near(kernels.linear(x, weight), PLAIN.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (3, 72), (4, 1100)])
@pytest.mark.parametrize("with_branch", [True, False])
def test_add_rms_norm(kernels: CudaKernels, dtype: torch.dtype, shape: tuple[int, int], with_branch: bool) -> None:
    x, weight = randn(*shape, dtype=dtype), 1 + 0.1 * randn(shape[1], dtype=dtype)
    branch = randn(*shape, dtype=dtype) if with_branch else None
    expected_x, expected = PLAIN.add_rms_norm(x, branch, weight, 1e-5)
    actual_x, actual = kernels.add_rms_norm(x.clone(), branch, weight, 1e-5)
    assert_near(actual_x, expected_x)  # the interpreter truncates, GPUs round
    assert_near(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 16), (9, 3, 64), (4, 1, 24), (32, 4, 8)])
def test_rotate_and_store(kernels: CudaKernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    mine, theirs = (random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=DEVICE) for _ in range(2))
    for name in ("keys", "values"):
        getattr(mine, name)[0].copy_(getattr(theirs, name)[0])
    steps = ragged_batch([(1, 5), (1, 40), (19, 30)], mine)
    qkv = randn(21, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = randn(21, head_dim // 2)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    actual = kernels.rotate_and_store(qkv, rope, steps, 0)
    expected = PLAIN.rotate_and_store(qkv, rope, replace(steps, cache=theirs), 0)
    assert_near(actual, expected)
    assert_near(mine.keys[0], theirs.keys[0])
    assert torch.equal(mine.values[0], theirs.values[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 24)])
@pytest.mark.parametrize(
    "spans",
    [
        [(1, 1)],
        [(1, 17), (1, 16), (1, 600), (1, 256)],
        [(20, 20)],
        [(1, 30), (5, 5), (150, 160), (2, 300), (43, 43)],
    ],
    ids=["first token", "decode", "one prompt", "mixed"],
)
def test_attend(
    kernels: CudaKernels, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, spans: list[tuple[int, int]]
) -> None:
    steps = ragged_batch(spans, random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=DEVICE))
    q = randn(sum(length for length, _ in spans), heads, head_dim, dtype=dtype)
    assert_near(kernels.attend(q, steps, 0), PLAIN.attend(q, steps, 0))


@CODES
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 16), (9, 3, 64), (4, 1, 24)])
def test_codes_in_the_cache_are_those_of_plain_pytorch(
    kernels: CudaKernels, codes: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> None:
    """To the bit, where no angle rounds: zeros, tiny and huge values, and values halfway between two codes."""
    mine, theirs = (random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=codes, device=DEVICE) for _ in range(2))
    steps = ragged_batch([(1, 5), (1, 40), (17, 30)], mine)
    qkv = randn(19, heads + 2 * kv_heads, head_dim) * torch.logspace(-30, 30, 19, device=DEVICE)[:, None, None]
    qkv[0] = 0
    qkv[1] = torch.arange(head_dim, device=DEVICE) + 0.5
    qkv[1, :, 0] = LARGEST_CODE[codes]
    rope = torch.stack((torch.ones(19, head_dim // 2), torch.zeros(19, head_dim // 2)), dim=-1).to(DEVICE)
    kernels.rotate_and_store(qkv.flatten(1), rope, steps, 0)
    PLAIN.rotate_and_store(qkv.flatten(1), rope, replace(steps, cache=theirs), 0)
    slots = steps.slot_mapping_T
    for ours, others in zip(*([*one.keys, *one.values, *one.scales(0)] for one in (mine, theirs)), strict=True):
        assert torch.equal(*(one.view(torch.uint8).flatten(0, 1)[slots] for one in (ours, others)))


@CODES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (9, 3, 64), (8, 1, 24)])
@pytest.mark.parametrize("spans", [[(1, 17), (1, 600)], [(1, 30), (5, 5), (70, 160)]], ids=["decode", "mixed"])
def test_attend_to_codes(
    kernels: CudaKernels,
    codes: torch.dtype,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    spans: list[tuple[int, int]],
) -> None:
    """Of every code, those of the smallest values included."""
    cache = random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=codes, device=DEVICE)
    every = torch.arange(256, dtype=torch.uint8).view(codes).float()
    every = every[every.abs() <= LARGEST_CODE[codes]].to(DEVICE)
    cache.values[0].flatten()[-len(every) :] = every.to(codes)
    steps = ragged_batch(spans, cache)
    q = randn(sum(length for length, _ in spans), heads, head_dim, dtype=dtype)
    assert_near(kernels.attend(q, steps, 0), PLAIN.attend(q, steps, 0))


def test_attend_gives_a_decoding_row_the_same_bits_in_any_company(kernels: CudaKernels) -> None:
    """Nor does the table's width, and so the number of programs, matter."""
    shared = random_cache(kv_heads=2, head_dim=16, dtype=HALF, device=DEVICE)
    spans = [(1, 530), (1, 3), (1, 257)]
    steps = ragged_batch(spans, shared)
    q = randn(3, 4, 16, dtype=HALF)
    together = kernels.attend(q, steps, 0)
    for row, span in enumerate(steps.spans):
        blocks = -(-span.seq_len // BLOCK_SIZE)
        one = replace(
            steps,
            query_starts_S1=steps.query_starts_S1[:2],
            seq_lens_S=steps.seq_lens_S[row : row + 1],
            block_tables_SN=steps.block_tables_SN[row : row + 1, :blocks],
            spans=(replace(span, row=0),),
            num_single=1,
        )
        assert torch.equal(kernels.attend(q[row : row + 1], one, 0)[0], together[row])


def test_the_memory_plan_knows_the_pieces() -> None:
    """It must do without Triton."""
    from llama2.kernels.cuda import decode_attention

    assert decode_attention.SPLIT == memory_plan.ATTENTION_PIECE


def test_a_context_of_many_pieces(kernels: CudaKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are combined at a time, and more than there are programs."""
    from llama2.kernels.cuda import decode_attention

    for name, value in {"SPLIT": 64, "PIECES": 4, "MIN_PROGRAMS": 6}.items():
        monkeypatch.setattr(decode_attention, name, value)
    steps = ragged_batch([(1, 600), (1, 33)], random_cache(kv_heads=2, head_dim=16, dtype=torch.float32, device=DEVICE))
    q = randn(2, 4, 16)
    assert_near(kernels.attend(q, steps, 0), PLAIN.attend(q, steps, 0))


@pytest.mark.parametrize("spans", [[(1, 40)], [(1, 600), (1, 7)], [(1, 300), (1, 2), (33, 290), (2, 2)], [(70, 70)]])
def test_a_recorded_pass_attends_as_the_same_pass_unrecorded(
    kernels: CudaKernels, spans: list[tuple[int, int]]
) -> None:
    """Bit for bit, though it has room for more sequences and rows, and only the tensors know how many there are."""
    batch = ragged_batch(spans, random_cache(kv_heads=2, head_dim=16, dtype=HALF, device=DEVICE))
    rows, sequences, room = sum(length for length, _ in spans), len(spans), 3
    q = randn(rows + room, 4, 16, dtype=HALF)
    padded = replace(
        batch,
        block_tables_SN=functional.pad(batch.block_tables_SN, (0, 2, 0, room)),
        seq_lens_S=functional.pad(batch.seq_lens_S, (0, room)),
        query_starts_S1=functional.pad(batch.query_starts_S1, (0, room), value=rows),
        num_single=sequences + room if batch.num_single == sequences else None,
    )
    assert torch.equal(kernels.attend(q, padded, 0)[:rows], kernels.attend(q[:rows], batch, 0))


@pytest.mark.parametrize("spans", [[(1, 300), (1, 20)], [(1, 30), (50, 160)]], ids=["decode", "mixed"])
def test_the_cache_may_keep_heads_apart(kernels: CudaKernels, spans: list[tuple[int, int]]) -> None:
    """(block, head, position, D) in memory: other addresses, the same bits."""
    batch = ragged_batch(spans, random_cache(kv_heads=2, head_dim=16, dtype=HALF, device=DEVICE))
    apart = copy(batch.cache)
    apart.keys, apart.values = (
        [cache[0].transpose(1, 2).contiguous().transpose(1, 2)] for cache in (batch.cache.keys, batch.cache.values)
    )
    rows = sum(length for length, _ in spans)
    qkv, angles = randn(rows, 8 * 16, dtype=HALF), randn(rows, 8)
    rope = torch.stack((angles.cos(), angles.sin()), dim=-1)
    found = []
    for steps in (batch, replace(batch, cache=apart)):
        q = kernels.rotate_and_store(qkv, rope, steps, 0)
        found.append((kernels.attend(q, steps, 0), steps.cache.keys[0], steps.cache.values[0]))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_the_counts_of_finished_programs_are_zero_again(kernels: CudaKernels) -> None:
    steps = ragged_batch([(1, 600), (1, 3), (1, 257)], random_cache(kv_heads=2, head_dim=16, dtype=HALF, device=DEVICE))
    kernels.attend(randn(3, 4, 16, dtype=HALF), steps, 0)
    assert not kernels._arrived.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 2200)])
def test_silu_mul(kernels: CudaKernels, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=dtype)
    assert_near(kernels.silu_mul(x), PLAIN.silu_mul(x.float()).to(dtype))


def test_a_model_on_these_kernels_replies_as_on_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, and with passes recorded where a GPU can do so: prompts, mixed steps, and batches that shrink."""
    args = tiny_args(vocab_size=512, n_kv_heads=2, n_layers=1)
    tokenizer = tiny_sentencepiece(tmp_path, vocab_size=512)
    folder = write_checkpoint(tmp_path / "checkpoint", args, random_weights(args), tokenizer)
    prompts = [[*range(3, 3 + length)] for length in (1, 19, 40)]
    params = [SamplingParams(temperature=0, max_new_tokens=length, ignore_eos=True) for length in (6, 2, 4)]

    def reply() -> list[Completion]:
        settings: dict[str, Any] = {"max_seq_len": 64, "max_batch_size": 3, "max_step_tokens": 24}
        return LLM(folder, dtype=torch.float32, device=DEVICE, **settings).generate(prompts, params)

    monkeypatch.setattr("llama2.weights.loader.choose_kernels", lambda *_: PLAIN)
    monkeypatch.setattr("llama2.engine.runner.choose_record", lambda device: None)
    expected = reply()
    monkeypatch.undo()

    if DEVICE.type == "cpu":
        from llama2.kernels.cuda.kernels import CudaKernels

        monkeypatch.setattr("llama2.weights.loader.choose_kernels", lambda device, dtype, _: CudaKernels(device, dtype))
        monkeypatch.setattr("llama2.engine.runner.choose_record", lambda device: Rerun)
    assert reply() == expected
