"""The C++ operators compute what plain PyTorch computes, and a row's bits do not depend on its company."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.batch import Batch
from llama2.config import ModelArgs
from llama2.kernels import choose_kernels
from llama2.kernels.cpu import library as cpu_library
from llama2.kernels.cpu.kernels import CpuKernels
from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import KVCache
from llama2.model import Transformer, rotary_table
from llama2.parallel.collectives import Collectives
from llama2.parallel.shared_layout import mapping_bytes
from llama2.parallel.shared_memory import SharedMemory
from llama2.weights.formats import Weight
from llama2.weights.formats.plain import Plain
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, ragged_batch, random_cache
from tests.support.models import make_model

# For a weight that is not packed: oneDNN multiplies more rows.
MAX_STREAMED_ROWS = 64
DTYPES = [torch.float32, torch.bfloat16]
# Relative to values near 1: fp32 sums in another order, and bf16 rounds to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}

PLAIN = PlainKernels()


def kernels() -> CpuKernels:
    assert cpu_library.load_library(), "the tests need a C++ compiler"
    return CpuKernels(torch.bfloat16)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), atol=tolerance, rtol=tolerance)


def test_it_is_what_a_cpu_gets() -> None:
    kernels()
    assert isinstance(choose_kernels(CPU, torch.bfloat16), CpuKernels)
    assert isinstance(choose_kernels(CPU, torch.float32), CpuKernels)
    assert type(choose_kernels(CPU, torch.float16)) is PlainKernels  # the operators know no fp16


def prepared(*weights: torch.Tensor, threads: int = 1) -> list[Any]:
    """As a model's kernels take them; the weights' own memory is laid out anew."""
    named = {str(index): [Weight(format=Plain(one.dtype), parts={"weight": one})] for index, one in enumerate(weights)}
    return [*kernels().prepare(named, threads=threads).values()]


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 7, 12, 13, 32, MAX_STREAMED_ROWS, MAX_STREAMED_ROWS + 1, 130])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(64, 64), (72, 100), (30, 7), (1, 33), (577, 1001), (1000, 16), (1536, 48)]
)
def test_linear(rows: int, inputs: int, outputs: int) -> None:
    x, weight = torch.randn(rows, inputs).bfloat16(), (torch.randn(outputs, inputs) / inputs**0.5).bfloat16()
    actual = kernels().linear(x, *prepared(weight.clone()))
    assert_near(actual, PLAIN.linear(x.float(), weight.float()).bfloat16())


@pytest.mark.parametrize("rows", [3, 9, MAX_STREAMED_ROWS, 130])
@pytest.mark.parametrize("inputs", [30, 201, 576, 1000, 1536])
@pytest.mark.parametrize("threads", [1, 3])
def test_linear_gives_a_row_the_same_bits_in_any_company(
    rows: int, inputs: int, threads: int, set_threads: Callable[[int], None]
) -> None:
    """Alone, in a batch, and in a piece of a prompt that was cut anywhere."""
    mine = kernels()
    if rows > MAX_STREAMED_ROWS and not torch.ops.llama2_cpu.packs_weights():
        pytest.skip("oneDNN makes products of so many rows")
    x, (weight,) = torch.randn(rows, inputs).bfloat16(), prepared(torch.randn(301, inputs).bfloat16())
    set_threads(threads)
    together = mine.linear(x, weight)
    for size in (*range(1, 14), 17, 64):
        assert torch.equal(torch.cat([mine.linear(piece, weight) for piece in x.split(size)]), together), size


def test_prepare_takes_no_memory_and_loses_no_value() -> None:
    weights = [torch.randn(outputs, inputs).bfloat16() for outputs, inputs in [(96, 64), (33, 7), (5, 30)]]
    before = [weight.clone() for weight in weights]
    places = [weight.data_ptr() for weight in weights]
    prepared(*weights, threads=2)
    assert [weight.data_ptr() for weight in weights] == places
    for weight, values in zip(weights, before, strict=True):
        assert torch.equal(weight.flatten().sort().values, values.flatten().sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prepare_leaves_other_dtypes_as_they_are(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64).to(dtype)
    before = weight.clone()
    assert torch.equal(prepared(weight)[0], before)


def test_linear_refuses_what_it_cannot_compute() -> None:
    x, weight = torch.randn(2, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    linear = torch.ops.llama2_cpu.prepare_bf16(weight.clone())
    for wrong in [x.float(), x[:, :4], x[0], torch.randn(8, 2).bfloat16().t()]:
        with pytest.raises(RuntimeError, match="linear"):
            linear.product(wrong)
    for wrong_weight in [weight.float(), weight.t(), weight.flatten()]:
        with pytest.raises(RuntimeError, match="linear"):
            torch.ops.llama2_cpu.prepare_bf16(wrong_weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (3, 72), (40, 601)])
@pytest.mark.parametrize("with_branch", [True, False])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, int], with_branch: bool) -> None:
    x, weight = torch.randn(shape).to(dtype), (1 + 0.1 * torch.randn(shape[1])).to(dtype)
    branch = torch.randn(shape).to(dtype) if with_branch else None
    expected_x, expected = PLAIN.add_rms_norm(x, branch, weight, 1e-5)
    actual_x, actual = kernels().add_rms_norm(x.clone(), branch, weight, 1e-5)
    assert torch.equal(actual_x, expected_x)
    assert_near(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "group", "head_dim"), [(1, 1, 64), (3, 3, 64), (2, 5, 24), (8, 1, 6)])
def test_rotate_and_store(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int) -> None:
    heads = kv_heads * group
    mine = random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
    steps = ragged_batch([(1, 1), (1, 30), (17, 40)], mine)
    qkv, rope = torch.randn(19, (heads + 2 * kv_heads) * head_dim).to(dtype), torch.randn(19, head_dim // 2, 2)
    actual = kernels().rotate_and_store(qkv, rope, steps, 0)
    keys, values = mine.keys[0].clone(), mine.values[0].clone()
    expected = PLAIN.rotate_and_store(qkv, rope, steps, 0)
    assert_near(actual, expected)
    assert_near(keys, mine.keys[0])
    assert torch.equal(values, mine.values[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 30, 1000])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = 3 * torch.randn(5, 2 * width).to(dtype)
    gate_up[0, :2] = torch.tensor([-100.0, 100.0])
    assert_near(kernels().silu_mul(gate_up), PLAIN.silu_mul(gate_up.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim"), [(3, 3, 64), (1, 7, 64), (1, 15, 40), (2, 4, 128), (2, 1, 24), (8, 8, 6)]
)
@pytest.mark.parametrize("spans", [[(1, 1), (1, 33), (1, 256), (1, 257)], [(1, 600)], [(1, 20), (5, 5), (30, 300)]])
def test_attend(dtype: torch.dtype, kv_heads: int, group: int, head_dim: int, spans: list[tuple[int, int]]) -> None:
    steps = ragged_batch(spans, random_cache(kv_heads=kv_heads, head_dim=head_dim, dtype=dtype))
    q = torch.randn(len(steps.positions_T), kv_heads * group, head_dim).to(dtype)
    assert_near(kernels().attend(q, steps, 0), PLAIN.attend(q, steps, 0))


def test_attend_gives_a_row_the_same_bits_in_any_company() -> None:
    """Alone, among others, and as one of a prompt's many rows."""
    shared = random_cache(kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    steps = ragged_batch([(1, 5), (1, 300), (400, 400)], shared)
    q = torch.randn(402, 6, 64).bfloat16()
    together = kernels().attend(q, steps, 0)
    for row, sequence, context in [(0, 0, 5), (1, 1, 300), (2, 2, 1), (200, 2, 199), (289, 2, 288), (401, 2, 400)]:
        alone = torch.ops.llama2_cpu.paged_attention(
            q[row : row + 1],
            shared.keys[0],
            shared.values[0],
            steps.block_tables_SN[sequence : sequence + 1].contiguous(),
            torch.tensor([0, 1], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
        )
        assert torch.equal(alone[0], together[row]), row


def small_model(collectives: Collectives | None = None) -> Transformer:
    args = ModelArgs(dim=72, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=24, hidden_dim=300, vocab_size=50)
    return make_model(args, kernels(), dtype=torch.bfloat16, max_seq_len=400, collectives=collectives)


def rope_of(model: Transformer, batch: Batch) -> torch.Tensor:
    return rotary_table(model.args, 400, CPU)[batch.positions_T]


def empty_cache(args: ModelArgs, dtype: torch.dtype = torch.bfloat16) -> KVCache:
    heads = args.n_kv_heads
    return KVCache(args, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=heads, dtype=dtype, device=CPU)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    "spans", [[(1, 33)], [(1, 5), (1, 300), (1, 40)], [(1, 20), (5, 5), (30, 300)], [(100, 300), (1, 5)]]
)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=["bf16", "int8", "fp8"])
def test_all_layers_as_one_operator_give_the_bits_of_the_steps_one_by_one(
    kept: torch.dtype, spans: list[tuple[int, int]], threads: int, set_threads: Callable[[int], None]
) -> None:
    model = small_model()
    caches = [empty_cache(model.args, kept), empty_cache(model.args, kept)]
    batch = ragged_batch(spans, caches[0])
    x, rope = torch.randn(len(batch.positions_T), model.args.dim).bfloat16(), rope_of(model, batch)
    one_by_one = PLAIN.chain(model.layers)(x.clone(), rope, replace(batch, cache=caches[1]))
    set_threads(threads)
    at_once = model.kernels.chain(model.layers)(x.clone(), rope, batch)
    for actual, expected in zip(at_once, one_by_one, strict=True):
        assert torch.equal(actual, expected)
    held = ([*one.keys, *one.values, *one.key_scales, *one.value_scales] for one in caches)
    for actual, expected in zip(*held, strict=True):
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


def test_a_rank_that_does_not_come_ends_the_layers_on_every_thread(set_threads: Callable[[int], None]) -> None:
    mapping = mmap.mmap(-1, mapping_bytes(2))
    model = small_model(SharedMemory(mapping, 0, 2, stall_seconds=0.1))
    batch = ragged_batch([(1, 33)], empty_cache(model.args))
    set_threads(2)
    with pytest.raises(RuntimeError, match="rank 1 stands at operation 0 and did not reach operation 1"):
        model.kernels.chain(model.layers)(torch.randn(1, model.args.dim).bfloat16(), rope_of(model, batch), batch)


def test_scores_that_differ_by_hundreds_do_not_overflow() -> None:
    mine = random_cache(kv_heads=1, head_dim=16, dtype=torch.float32)
    mine.keys[0].mul_(200)
    steps = ragged_batch([(1, 400)], mine)
    q = torch.randn(1, 2, 16)
    actual = kernels().attend(q, steps, 0)
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, PLAIN.attend(q, steps, 0), atol=1e-3, rtol=1e-3)


OTHER = """
import sys, torch
from pathlib import Path
from torch.utils import cpp_extension
sources = [str(file) for file in Path(sys.argv[1]).glob("*.cpp")]
flags = ["-O1", "-fopenmp", *sys.argv[3:]]
cpp_extension.load("llama2_cpu", sources, extra_cflags=flags, build_directory=sys.argv[2], is_python_module=False)
assert not torch.ops.llama2_cpu.packs_weights()
torch.manual_seed(0)
x, weight = torch.randn(6, 70).bfloat16(), torch.randn(9, 70).bfloat16()
expected = x @ weight.t()
linear = torch.ops.llama2_cpu.prepare_bf16(weight)
torch.testing.assert_close(linear.product(x), expected, atol=0.1, rtol=0.02)
attend = torch.ops.llama2_cpu.paged_attention
table, starts, context = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]).int(), torch.tensor([33]).int()
scales = torch.rand(2, 1, 40, 2)
for dtype in (torch.int8, torch.float8_e4m3fn):
    codes = (100 * torch.randn(2, 1, 40, 2, 24)).clamp(-127, 127).to(dtype)
    for q in (torch.randn(1, 4, 24) / 100, torch.randn(1, 4, 24).bfloat16() / 100):
        plain = attend(q, *(codes.float() * scales[..., None]).to(q.dtype), table, starts, context)
        actual = attend(q, *codes, table, starts, context, *scales)
        tolerance = 1e-4 if q.dtype == torch.float32 else 0.05
        torch.testing.assert_close(actual, plain, atol=100 * tolerance, rtol=tolerance)
a, b, slots = torch.randn(2, 2, 5, 70), torch.randn(2, 5, 50), torch.tensor([0, -1, 1, 1, 0, 1]).int()
ranks, factors = torch.tensor([[5, 3], [0, 4]]).int(), torch.rand(2, 2)
for dtype in (torch.float32, torch.bfloat16):
    values = [torch.randn(6, 50), torch.randn(6, 70) / 8, a / 8, b]
    y, *others = (each.to(dtype) for each in values)
    own_x, own_a, own_b = (each.float() for each in others)
    expected = y.float()
    for row, slot in enumerate(slots.tolist()):
        for part, columns in enumerate((slice(0, 40), slice(40, 50)) if slot >= 0 else ()):
            rank = ranks[slot, part]
            shrunk = factors[slot, part] * (own_a[slot, part, :rank] @ own_x[row])
            expected[row, columns] += shrunk @ own_b[slot, :rank, columns]
    torch.ops.llama2_cpu.add_lora(y, *others, ranks, factors, [40, 10], slots)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(y.float(), expected, atol=tolerance, rtol=tolerance)
x, scales = torch.randn(9, 64).bfloat16(), torch.rand(40, 2)
make = torch.ops.llama2_cpu.prepare_quantized
for int8_rows in (False, True):
    codes = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    nibbles = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    packed = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    zeros = torch.randint(0, 17, (40, 2), dtype=torch.uint8)
    table, none = [float(code) for code in range(16)], (None, None, None)
    for values, linear in (
        (codes.float(), make(codes.clone(), scales.clone(), None, *none, [], int8_rows)),
        (nibbles - 8.0, make(packed.clone(), scales.clone(), None, *none, [code - 8 for code in table], int8_rows)),
        (nibbles - zeros.float().repeat_interleave(32, 1),
         make(packed, scales.clone(), zeros.clone(), *none, table, int8_rows)),
    ):
        expected = x.float() @ (values * scales.repeat_interleave(32, 1)).T
        error = (linear.product(x) - expected).norm() / expected.norm()
        assert error < (0.02 if int8_rows else 0.005), error
"""


# Here a processor with AVX512 runs what one with AMX runs: our own code has no AMX instructions.
@pytest.mark.integration
@pytest.mark.parametrize(
    ("capability", "needed", "flags"),
    [
        ("AVX2", "avx2", ["-march=x86-64-v3"]),
        ("AVX512", "avx512_bf16", ["-march=x86-64-v4", "-mavx512bf16", "-mamx-bf16"]),
    ],
)
def test_a_processor_that_gains_nothing_from_packing_computes_the_same(
    capability: str, needed: str, flags: list[str], tmp_path: Path
) -> None:
    if needed not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"needs a CPU with {needed}")
    flags = [*flags, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-c", OTHER, str(cpu_library.SOURCES), str(tmp_path), *flags]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
