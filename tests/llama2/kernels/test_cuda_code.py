"""The Triton kernels as machine code for GPUs that are not here, at the shapes of the models that we serve.

What an interpreter cannot show: that they compile, that registers suffice, how many programs fit on a multiprocessor,
which path weights take, and what a kernel does before it waits for the one before it. `make test-kernels` runs them.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.shapes import SHAPES
from llama2.batch import Batch
from llama2.config import ModelArgs
from llama2.kv_cache import LARGEST_CODE, KVCache
from tests.support.lora import random_layers
from tests.support.models import make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs triton, and not as an interpreter",
    ),
]
if TYPE_CHECKING:
    from tests.support.cuda_compiler import Launch, MachineCode

META = torch.device("meta")
# Registers and bytes of shared memory of a multiprocessor, of which each program takes 1,024 more than it asks for.
REGISTERS = 64 << 10
SHARED_BYTES = {80: 164 << 10, 90: 228 << 10}


def share_of(args: ModelArgs, ranks: int) -> ModelArgs:
    """What one of `ranks` computes, as its own model."""
    return replace(
        args,
        n_heads=args.n_heads // ranks,
        n_kv_heads=args.n_kv_heads // ranks,
        hidden_dim=args.hidden_dim // ranks,
        vocab_size=args.vocab_size // ranks,
    )


MODELS = {f"{name} TP {ranks}": share_of(SHAPES[name], ranks) for name in ("7b", "13b", "70b") for ranks in (1, 8)}
MODELS["SmolLM2"] = SHAPES["135m"]
TARGETS = [
    (name, dtype, dtype, cap) for cap in (90, 80) for dtype in (torch.bfloat16, torch.float16) for name in MODELS
] + [
    # But for prompts of SmolLM2 on sm_80, which lack four registers.
    (name, torch.bfloat16, codes, cap)
    for cap in (90, 80)
    for codes in LARGEST_CODE
    for name in ("7b TP 1", "70b TP 8", "SmolLM2")
    if (name, cap) != ("SmolLM2", 80)
]
# Their widest and their narrowest products, and one with fewer inputs than many threads.
QUANTIZED = [
    (name, quantize, cap)
    for cap in (90, 80)
    for name, quantize in (
        *(("7b TP 1", each) for each in ("int8", "int4", "nf4", "nf4_double")),
        ("70b TP 8", "int4"),
        ("SmolLM2", "int4"),
    )
]
# Their products, and the largest rank of an adapter.
ADAPTED = [
    (name, max_rank, cap) for cap in (90, 80) for name, max_rank in (("7b TP 1", 16), ("70b TP 8", 64), ("SmolLM2", 8))
]


@dataclass(frozen=True, slots=True)
class Built:
    launch: Launch
    code: MachineCode
    capability: int

    def __str__(self) -> str:
        return f"{self.launch.name} {self.launch.constants} for {self.capability}"

    @property
    def programs_per_multiprocessor(self) -> int:
        threads = 32 * self.launch.option("num_warps")
        by_registers = REGISTERS // (self.code.registers * threads)
        return min(by_registers, SHARED_BYTES[self.capability] // (self.code.shared_bytes + 1024))


@cache
def launches_of(
    name: str, dtype: torch.dtype, kept: torch.dtype, hopper: bool, quantize: str | None = None
) -> frozenset[Launch]:
    """Those of a layer and the head, in passes that decode 1 to 32 rows and in some that hold a prompt too.

    `kept` is the dtype of the KV cache.
    """
    from llama2.kernels.cuda.kernels import CudaKernels
    from tests.support.cuda_compiler import noted_launches

    args = replace(MODELS[name], n_layers=1)
    model = make_model(
        args,
        CudaKernels(META, dtype, hopper=hopper),
        dtype=dtype,
        device=META,
        max_seq_len=4096,
        fill=lambda weights: None,
        quantize=quantize,
    )
    kv_cache = KVCache(args, num_blocks=256, block_size=16, n_kv_heads=args.n_kv_heads, dtype=kept, device=META)

    def batch(lengths: list[int], num_single: int | None) -> Batch:
        tokens, sequences = sum(lengths), len(lengths)
        return Batch(
            positions_T=torch.empty(tokens, dtype=torch.int64, device=META),
            slot_mapping_T=torch.empty(tokens, dtype=torch.int64, device=META),
            query_starts_S1=torch.empty(sequences + 1, dtype=torch.int32, device=META),
            seq_lens_S=torch.empty(sequences, dtype=torch.int32, device=META),
            block_tables_SN=torch.empty(sequences, 256, dtype=torch.int32, device=META),
            spans=(),
            num_single=num_single,
            cache=kv_cache,
        )

    with noted_launches() as launches, torch.inference_mode():
        decoding = [batch([1] * rows, rows) for rows in (1, 2, 8, 16, 32)]
        for steps in (*decoding, batch([1, 511], 1), batch([1, 511], None)):
            tokens_T = torch.empty(len(steps.positions_T), dtype=torch.int64, device=META)
            rows_R = torch.empty(len(steps.seq_lens_S), dtype=torch.int64, device=META)
            model(tokens_T, steps, rows_R)
    return frozenset(launches)


@cache
def build(launch: Launch, capability: int) -> Built:
    from tests.support.cuda_compiler import compile_for

    return Built(launch, compile_for(launch, capability), capability)


def build_all(launches: Collection[Launch], capability: int) -> list[Built]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(build, launches, [capability] * len(launches)))


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: ", ".join(map(str, target)))
def kernels(request: pytest.FixtureRequest) -> list[Built]:
    name, dtype, kept, capability = request.param
    return build_all(launches_of(name, dtype, kept, capability >= 90), capability)


@pytest.fixture(scope="module", params=QUANTIZED, ids=lambda target: f"{target[0]}, {target[1]}, sm_{target[2]}")
def quantized(request: pytest.FixtureRequest) -> list[Built]:
    """The kernels that take quantized weights."""
    name, quantize, capability = request.param
    launches = launches_of(name, torch.bfloat16, torch.bfloat16, capability >= 90, quantize)
    found = build_all([one for one in launches if one.name in ("_linear_quantized", "_dequantize")], capability)
    assert {one.launch.name for one in found} == {"_linear_quantized", "_dequantize"}
    return found


@pytest.fixture(scope="module", params=ADAPTED, ids=lambda target: f"{target[0]}, {target[1]}, sm_{target[2]}")
def adapted(request: pytest.FixtureRequest) -> list[Built]:
    """The kernels of adapters, for a few rows and for many."""
    from llama2.kernels.cuda.kernels import CudaKernels
    from tests.support.cuda_compiler import noted_launches

    name, max_rank, capability = request.param
    args, kernels = MODELS[name], CudaKernels(META, torch.bfloat16, hopper=capability >= 90)
    loras = random_layers(replace(args, n_layers=1), max_rank=max_rank, dtype=torch.bfloat16, device=META)[0]
    with noted_launches() as launches:
        for lora, rows in itertools.product(loras.values(), (8, 100)):
            x, y = (torch.empty(rows, size, device=META) for size in (lora.a_SPRC.shape[3], lora.b_SRF.shape[2]))
            slots_T = torch.empty(rows, dtype=torch.int32, device=META)
            kernels.add_lora(y.bfloat16(), x.bfloat16(), lora, slots_T)
    return build_all(frozenset(launches), capability)


def of(kernels: list[Built], name: str) -> list[Built]:
    found = [one for one in kernels if one.launch.name == name]
    assert found, f"{name} is not launched"
    return found


def assert_registers_suffice(kernels: list[Built]) -> None:
    for one in kernels:
        assert one.code.stack_bytes == one.code.count("LDL", "STL") == 0, f"{one} needs more"


def test_registers_suffice(kernels: list[Built]) -> None:
    assert_registers_suffice(kernels)


def test_registers_suffice_for_quantized_weights(quantized: list[Built]) -> None:
    assert_registers_suffice(quantized)


def test_registers_suffice_for_adapters(adapted: list[Built]) -> None:
    assert_registers_suffice(adapted)


def test_a_tile_of_rows_meets_its_adapter_in_tensor_cores(adapted: list[Built]) -> None:
    for one in of(adapted, "_shrink"):
        assert (one.code.count("HMMA") > 0) == (one.launch.constant("M") > 1), one


def test_codes_go_from_memory_to_tensor_cores_in_registers(quantized: list[Built]) -> None:
    """Where they become values and meet x: nothing of it goes through shared memory, or to another thread."""
    for one in of(quantized, "_linear_quantized"):
        last = len(one.code.operations) - one.code.operations[::-1].index("HMMA")
        moved = {"LDS", "LDSM", "STS", "STSM", "LDGSTS", "SHFL", "BAR"} & set(one.code.operations[:last])
        assert not moved, one


def test_weights_go_from_memory_to_registers(kernels: list[Built]) -> None:
    """Not through shared memory, which a product uses only for its sums over warps."""
    for one in of(kernels, "_linear"):
        assert one.code.count("LDSM", "LDGSTS", "UBLKCP", "UTMALDG") == 0, one
        assert one.code.shared_bytes <= 256, one
        assert one.code.count("LDG") >= one.launch.constant("C") / one.launch.constant("K") * one.launch.constant("N")


def test_attention_of_prompts_has_two_programs_on_a_multiprocessor(kernels: list[Built]) -> None:
    for one in of(kernels, "_attend_prefill"):
        assert one.programs_per_multiprocessor >= 2, one
        assert one.code.count("HGMMA" if one.capability >= 90 else "HMMA") > 0, one


def test_attention_of_decoding_fetches_keys_ahead(kernels: list[Built]) -> None:
    for one in of(kernels, "_attend_pieces"):
        assert one.programs_per_multiprocessor >= 2, one
        assert one.code.count("LDGSTS") > 0, one


def assert_nothing_is_written_early(kernels: list[Built]) -> None:
    """ACQBULK is griddepcontrol.wait; what is read before it are weights and the inputs of the pass."""
    for one in kernels:
        if one.capability < 90:
            assert one.code.count("ACQBULK") == 0, one
            continue
        assert one.launch.option("launch_pdl"), one
        assert one.code.count("ACQBULK") == 1, one
        early = one.code.before("ACQBULK")
        assert not {"STG", "ATOMG", "RED", "LDGSTS"} & set(early), one


def test_nothing_is_written_before_earlier_kernels_have_ended(kernels: list[Built]) -> None:
    assert_nothing_is_written_early(kernels)


def test_nothing_of_adapters_is_written_before_earlier_kernels_have_ended(adapted: list[Built]) -> None:
    assert_nothing_is_written_early(adapted)


def test_no_product_of_quantized_weights_is_written_before_earlier_kernels_have_ended(quantized: list[Built]) -> None:
    assert_nothing_is_written_early(quantized)


def test_codes_of_two_steps_are_on_their_way_before_earlier_kernels_have_ended(quantized: list[Built]) -> None:
    for one in of(quantized, "_linear_quantized"):
        if one.capability >= 90:
            constant, given = one.launch.constant, dict(one.launch.types)
            tables = 8 if given["table"] != "constexpr" else 0
            per_group = sum(given[name] != "constexpr" for name in ("scales", "zeros", "mins"))
            of_outputs = 2 if given["output_scales"] != "constexpr" else 0
            # A block's codes are one load for each thread, 16 bytes wide; of a group it has the values of two outputs.
            loads = 1 + constant("BLOCK") // constant("CHUNK") * 2 * per_group
            expected = tables + constant("TILES") * (of_outputs + 2 * loads)
            assert one.code.before("ACQBULK").count("LDG") == expected, one


def test_weights_are_on_their_way_before_earlier_kernels_have_ended(kernels: list[Built]) -> None:
    for one in of(kernels, "_linear"):
        if one.capability >= 90:
            tiles = -(-min(one.launch.constant("C"), one.launch.constant("EARLY")) // one.launch.constant("K"))
            # A row of a tile is one load for each thread, 16 bytes wide.
            assert one.code.before("ACQBULK").count("LDG") == tiles * one.launch.constant("N"), one
