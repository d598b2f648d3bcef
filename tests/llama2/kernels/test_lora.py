"""What adapters add on a CPU is what plain PyTorch adds, and a row's bits do not depend on its company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from llama2.adapters.products import BatchAdapters
from llama2.batch import Batch
from llama2.config import ModelArgs
from llama2.kernels.cpu.kernels import CpuKernels
from llama2.kernels.cpu.library import load_library
from llama2.kernels.plain import PlainKernels
from llama2.kv_cache import KVCache
from llama2.model import rotary_table
from tests.support.batches import BLOCK_SIZE, CPU, NUM_BLOCKS, ragged_batch
from tests.support.lora import random_layers, random_product
from tests.support.models import make_model

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
ARGS = ModelArgs(dim=72, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=24, hidden_dim=300, vocab_size=50)
PLAIN = PlainKernels()


def kernels() -> CpuKernels:
    assert load_library(), "the tests need a C++ compiler"
    return CpuKernels(torch.bfloat16)


def slots_of(rows: int, num_slots: int = 5) -> torch.Tensor:
    """Any slot or none for each row."""
    return torch.randint(-1, num_slots, (rows,), dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 33])
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(576, (576, 192, 192)), (1536, (576,)), (33, (7,)), (100, (301, 301)), (1, (40, 3))]
)
@pytest.mark.parametrize("max_rank", [1, 8, 13])
def test_it_adds_what_plain_pytorch_adds(
    dtype: torch.dtype, rows: int, inputs: int, outputs: tuple[int, ...], max_rank: int
) -> None:
    lora = random_product(inputs, outputs, max_rank=max_rank, dtype=dtype)
    x, y, slots_T = torch.randn(rows, inputs).to(dtype), torch.randn(rows, sum(outputs)).to(dtype), slots_of(rows)
    expected = PLAIN.add_lora(y.clone(), x, lora, slots_T)
    actual = kernels().add_lora(y.clone(), x, lora, slots_T)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(actual[slots_T < 0], y[slots_T < 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_a_row_has_the_same_bits_in_any_company(
    dtype: torch.dtype, threads: int, set_threads: Callable[[int], None]
) -> None:
    """Alone, among rows of its own slot or of others, and in a piece of a prompt that was cut anywhere."""
    lora, rows = random_product(577, (300, 101), dtype=dtype), 41
    x, y, slots_T = torch.randn(rows, 577).to(dtype), torch.randn(rows, 401).to(dtype), slots_of(rows)
    slots_T[20:] = 1
    set_threads(threads)
    together = kernels().add_lora(y.clone(), x, lora, slots_T)
    for size in (1, 2, 3, 4, 5, 11):
        pieces = zip(y.split(size), x.split(size), slots_T.split(size), strict=True)
        apart = [kernels().add_lora(own_y.clone(), own_x, lora, own) for own_y, own_x, own in pieces]
        assert torch.equal(torch.cat(apart), together), size


def empty_cache() -> KVCache:
    heads = ARGS.n_kv_heads
    return KVCache(
        ARGS, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, n_kv_heads=heads, dtype=torch.bfloat16, device=CPU
    )


def rope_of(batch: Batch) -> torch.Tensor:
    return rotary_table(ARGS, 400, CPU)[batch.positions_T]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("spans", [[(1, 33)], [(1, 5), (1, 300), (1, 40)], [(1, 20), (5, 5), (30, 300)]])
def test_all_layers_as_one_operator_add_the_bits_of_the_steps_one_by_one(
    spans: list[tuple[int, int]], threads: int, set_threads: Callable[[int], None]
) -> None:
    model = make_model(ARGS, kernels(), dtype=torch.bfloat16, max_seq_len=400)
    layers = random_layers(ARGS, dtype=torch.bfloat16)
    run = model.kernels.chain(model.layers)
    set_threads(threads)
    for _ in range(2):
        batch = ragged_batch(spans, empty_cache())
        rows = len(batch.positions_T)
        batch = replace(batch, adapters=BatchAdapters(slots_T=slots_of(rows), layers=layers))
        x, rope = torch.randn(rows, ARGS.dim).bfloat16(), rope_of(batch)
        expected = PLAIN.chain(model.layers)(x.clone(), rope, replace(batch, cache=empty_cache()))
        actual = run(x.clone(), rope, batch)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other)
        layers = random_layers(ARGS, dtype=torch.bfloat16)  # of another model's memory


def test_all_layers_give_a_row_the_same_bits_in_any_company() -> None:
    model = make_model(ARGS, kernels(), dtype=torch.bfloat16, max_seq_len=400)
    layers, spans = random_layers(ARGS, dtype=torch.bfloat16), [(1, 1), (1, 1), (1, 1), (5, 5), (9, 9)]
    run, slots_S = model.kernels.chain(model.layers), [2, -1, 0, 2, 4]
    x = torch.randn(17, ARGS.dim).bfloat16()

    def outputs(of: list[int]) -> list[torch.Tensor]:
        """Of these sequences, in one pass."""
        lengths = [spans[sequence][0] for sequence in of]
        batch = ragged_batch([spans[sequence] for sequence in of], empty_cache())
        slots_T = torch.tensor([slots_S[sequence] for sequence in of], dtype=torch.int32)
        adapters = BatchAdapters(slots_T=slots_T.repeat_interleave(torch.tensor(lengths)), layers=layers)
        own_x = torch.cat([x.split([length for length, _ in spans])[sequence] for sequence in of])
        done = run(own_x, rope_of(batch), replace(batch, adapters=adapters))
        return list(torch.cat(done, dim=1).split(lengths))

    together = outputs([0, 1, 2, 3, 4])
    for sequence in range(5):
        assert torch.equal(outputs([sequence])[0], together[sequence]), sequence


def test_rows_without_adapters_are_those_of_a_batch_without() -> None:
    model = make_model(ARGS, kernels(), dtype=torch.bfloat16, max_seq_len=400)
    batch = ragged_batch([(1, 33), (1, 5)], empty_cache())
    x, rope, run = torch.randn(2, ARGS.dim).bfloat16(), rope_of(batch), model.kernels.chain(model.layers)
    expected = run(x.clone(), rope, replace(batch, cache=empty_cache()))
    none_T = torch.tensor([-1, -1], dtype=torch.int32)
    adapters = BatchAdapters(slots_T=none_T, layers=random_layers(ARGS, dtype=torch.bfloat16))
    for one, other in zip(run(x.clone(), rope, replace(batch, adapters=adapters)), expected, strict=True):
        assert torch.equal(one, other)


def test_it_refuses_what_it_cannot_compute() -> None:
    lora, x, y = random_product(8, (4, 4), dtype=torch.bfloat16), torch.randn(2, 8).bfloat16(), torch.randn(2, 8)
    slots_T, add = torch.tensor([0, -1], dtype=torch.int32), kernels().add_lora
    for wrong_y, wrong_x, wrong_T in [
        (y, x, slots_T),
        (y.bfloat16(), x[:, :4], slots_T),
        (y.bfloat16(), x.T.contiguous().T, slots_T),
        (y.bfloat16(), x, slots_T.long()),
        (y.bfloat16(), x, slots_T[:1]),
        (y.bfloat16(), x, slots_T + 5),
    ]:
        with pytest.raises(RuntimeError, match="lora"):
            add(wrong_y, wrong_x, lora, wrong_T)
    with pytest.raises(RuntimeError, match="lora"):
        add(y.bfloat16(), x, replace(lora, outputs=(4, 3)), slots_T)
