"""What the plan says of memory is what a load takes."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shapes import SHAPES
from llama2 import kv_cache
from llama2.config import EngineConfig
from llama2.engine.loading import load_engine
from llama2.kv_cache import KVCache
from llama2.machine.memory_plan import DEQUANTIZED_BYTES, reserve
from llama2.model import rotary_table
from llama2.parallel.plan import allocate, build_mesh, local_size
from llama2.parallel.process_group import init_process_group
from llama2.weights import capacity
from llama2.weights.capacity import AS_STORED, Devices, count_capacity
from llama2.weights.capacity_report import report
from llama2.weights.convert import convert
from llama2.weights.convert_command import main
from llama2.weights.precision import PRECISIONS, Quantizer
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.source import open_source
from llama2.weights.spec import Spec
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

CPU = torch.device("cpu")
HOST = Devices(count=None, nbytes=64 << 30)
# Of 5 KV heads 3 ranks have 2, 2 and 1, of 11 groups of hidden features 4, 4 and 3. Each of 2 KV heads is on 2 of 4.
MODELS = {
    "5 KV heads": tiny_args(dim=160, n_heads=10, n_kv_heads=5, hidden_dim=352, vocab_size=500),
    "2 KV heads": tiny_args(dim=256, n_heads=4, n_kv_heads=2, hidden_dim=640, vocab_size=481),
}


@pytest.fixture(
    scope="module", params=[(name, quantize) for name in MODELS for quantize in (None, "int8", "int4", "nf4")]
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """Meta's folder, what it is converted to, and the result."""
    name, quantize = request.param
    args, folder = MODELS[name], tmp_path_factory.mktemp("capacity")
    weights = random_weights(args, dtype=torch.bfloat16)
    source = meta_folder(folder / "meta", args, weights, num_shards=1)
    tiny_sentencepiece(source, vocab_size=args.vocab_size)
    convert(source, folder / "out", quantize=quantize)
    return source, quantize or AS_STORED, folder / "out"


def allocated(folder: str) -> tuple[int, int, int]:
    """This rank's bytes of weights, and of a KV cache of 100 blocks of 16 tokens: as the weights are, and in int8."""
    init_process_group(CPU)
    spec = DcpFolder(folder).spec
    mesh = build_mesh(spec, "cpu")
    weights, _ = allocate(spec, mesh, device=CPU)
    parts = [part for several in weights.values() for weight in several for part in weight.parts.values()]
    heads = local_size("kv_heads", spec.args.n_kv_heads, mesh)
    kv = []
    for dtype in (spec.dtype, torch.int8):
        cache = KVCache(spec.args, num_blocks=99, block_size=16, n_kv_heads=heads, dtype=dtype, device=CPU)
        held = (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales)
        kv.append(sum(one.nbytes for one in held))
    return sum(part.nbytes for part in parts), kv[0], kv[1]


@pytest.mark.integration
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_a_plan_of_the_source_has_the_bytes_that_a_load_of_the_result_takes(
    converted: tuple[Path, str, Path], degree: int
) -> None:
    """To the byte: of the rank that has the most. The result itself has the same plan."""
    source, precision, folder = converted
    found = count_capacity(open_source(source).reader.spec, HOST)
    again = count_capacity(DcpFolder(folder).spec, HOST)
    planned, in_int8 = found.loads[precision], found.loads_int8[precision]
    assert (planned, in_int8) == (again.loads[AS_STORED], again.loads_int8[AS_STORED])
    if degree not in planned:
        with pytest.raises(RuntimeError, match=f"cannot run at tensor-parallel degree {degree}"):
            run_ranks(degree, allocated, str(folder))
        return
    held = tuple(max(each) for each in zip(*run_ranks(degree, allocated, str(folder)), strict=True))
    load = planned[degree]
    assert (load.weights, load.kv_per_token * 1600, in_int8[degree].kv_per_token * 1600) == held


def loaded_tokens(folder: str, sizes: list[int], kept: str) -> list[int]:
    """Tokens of KV cache that engines with the default options have, where so many bytes are free after loading."""
    tokens = []
    for free in sizes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_cache, "free_memory", lambda device, free=free: free)
            engine = load_engine(folder, device="cpu", config=EngineConfig(kv_cache_dtype=kept))
        tokens.append(engine.stats().total_blocks * engine.config.block_size)
    return tokens


@pytest.mark.integration
@pytest.mark.parametrize(("degree", "kept"), [(1, "auto"), (2, "auto"), (1, "int8"), (2, "int8")])
def test_a_plan_has_the_tokens_that_an_engine_has(converted: tuple[Path, str, Path], degree: int, kept: str) -> None:
    spec = DcpFolder(converted[2]).spec
    table = rotary_table(spec.args, spec.args.context_length, CPU).nbytes
    planned, left = [], []
    for nbytes in (60_000_000, 100_000_000, 4_000_000_000):
        found = count_capacity(spec, Devices(count=None, nbytes=nbytes))
        load = (found.loads if kept == "auto" else found.loads_int8)[AS_STORED][degree]
        assert load.room is not None
        planned.append(load.room.tokens)
        left.append(nbytes // degree - load.weights - table)
    tokens = run_ranks(degree, loaded_tokens, str(converted[2]), left, kept)[0]
    assert planned == tokens


def llama(name: str, gpus: str, stored: torch.dtype = torch.bfloat16, **formats: Any) -> capacity.Capacity:
    return count_capacity(Spec(args=SHAPES[name], dtype=stored, **formats), Devices.read(gpus))


def test_70b_in_4_bits_takes_less_than_40_gb_and_two_cards_of_24_gib_serve_it() -> None:
    found = llama("70b", "2x24GiB")
    for precision, gigabytes in (("int4", 36.39), ("nf4", 39.06)):
        load = found.loads[precision]
        assert load[1].weights == pytest.approx(gigabytes * 1e9, rel=1e-3)
        # Norms are on both.
        assert load[1].weights <= 2 * load[2].weights <= 40e9
        room = load[2].room
        assert room is not None
        assert room.sequences >= 1
        taken = load[2].weights + sum(room.reserved.values()) + room.tokens * load[2].kv_per_token
        assert taken <= 24 << 30
    assert found.choose() == ("nf4", 2)


def test_weights_in_bf16_are_two_bytes_for_each_parameter() -> None:
    for name, billions in (("7b", 6.738), ("13b", 13.016), ("70b", 68.977)):
        found = llama(name, "80GiB")
        assert found.loads[AS_STORED][1].weights == pytest.approx(2e9 * billions, rel=1e-4)


def test_what_the_steps_need_is_left_free() -> None:
    """0.9 of the rest is the KV cache, as of an engine on that GPU."""
    room = llama("7b", "24GiB").loads[AS_STORED][1].room
    assert room is not None
    config = EngineConfig(max_seq_len=4096, max_batch_size=16)
    assert room.reserved == reserve(SHAPES["7b"], config, dtype=torch.bfloat16, degree=1)
    left = (24 << 30) - 2 * 6_738_415_616 - sum(room.reserved.values())
    assert room.tokens * 512 * 1024 == pytest.approx(0.9 * left, rel=2e-3)


def test_values_of_quantized_weights_have_room_beside_them() -> None:
    """What `CudaKernels.prepare` sets up for them, and nothing where none is quantized."""
    rooms = {name: loads[1].room for name, loads in llama("7b", "24GiB").loads.items()}
    for name, room in rooms.items():
        assert room is not None
        values = room.reserved.get("values of quantized weights", 0)
        assert values == (0 if name == AS_STORED else DEQUANTIZED_BYTES), name
        assert room.tokens > 0


@pytest.mark.parametrize(
    ("name", "gpus", "chosen"),
    [
        ("7b", "80GiB", (AS_STORED, 1)),
        ("7b", "8x80GiB", (AS_STORED, 1)),  # 8 sequences fit on one
        ("7b", "2x24GiB", (AS_STORED, 2)),  # 4 on one, more on two
        ("7b", "14GiB", ("int8", 1)),
        ("7b", "7GiB", ("nf4", 1)),
        ("13b", "24GiB", ("int8", 1)),
        ("70b", "8x80GB", (AS_STORED, 2)),
        ("70b", "2x80GiB", (AS_STORED, 2)),
        ("70b", "48GiB", ("nf4", 1)),
        ("70b", "24GiB", None),
    ],
)
def test_the_most_precise_that_fits_is_chosen_at_the_lowest_degree_that_has_room(
    name: str, gpus: str, chosen: tuple[str, int] | None
) -> None:
    assert llama(name, gpus).choose() == chosen


def test_nothing_is_gained_by_another_format_that_is_not_smaller() -> None:
    """Of weights in int4 only a smaller one would be chosen, and there is none."""
    int4 = llama("7b", "80GiB").specs["int4"]
    assert llama("7b", "4GiB", formats=int4.formats).choose() is None
    assert llama("7b", "8GiB", formats=int4.formats).choose() == (AS_STORED, 1)


def test_weights_in_fp32_are_bf16_on_a_gpu_and_themselves_on_a_cpu() -> None:
    on_gpu = llama("tiny", "80GiB", torch.float32)
    assert list(on_gpu.loads) == [AS_STORED, "int8", "nf4", "int4"]
    assert on_gpu.loads == llama("tiny", "80GiB").loads
    on_cpu = count_capacity(Spec(args=SHAPES["tiny"], dtype=torch.float32), HOST)
    stored, bf16 = (on_cpu.loads[name][1] for name in (AS_STORED, "bf16"))
    assert (stored.weights, stored.kv_per_token) == (2 * bf16.weights, 2 * bf16.kv_per_token)
    assert "KV float32" in report(on_cpu, "tiny")


def test_a_precision_that_a_model_cannot_have_is_named() -> None:
    args = replace(SHAPES["tiny"], head_dim=10)
    found = count_capacity(Spec(args=args, dtype=torch.bfloat16), HOST)
    assert set(found.refused) == {"int8", "nf4", "int4"}
    assert "Not possible: int4, since layers.0.attention.wo cannot be quantized" in report(found, "tiny")


def test_the_order_of_precision_is_that_of_the_errors() -> None:
    torch.manual_seed(0)
    values = torch.randn(512, 4096)
    errors = []
    for format in (PRECISIONS[name] for name in capacity.MADE[1:]):
        assert isinstance(format, Quantizer)
        error = format.dequantize(format.quantize(values)) - values
        errors.append((error.square().mean() / values.square().mean()).sqrt().item())
    assert errors == pytest.approx([0.005, 0.092, 0.101], abs=0.001)


@pytest.mark.parametrize(
    ("text", "count", "nbytes"),
    [("2x24GiB", 2, 24 << 30), ("80GB", 1, 80 * 10**9), ("8x80gib", 8, 80 << 30), ("1.5GiB", 1, 3 << 29)],
)
def test_gpus_are_read(text: str, count: int, nbytes: int) -> None:
    assert Devices.read(text) == Devices(count=count, nbytes=nbytes)


@pytest.mark.parametrize(
    "text", ["", "24", "24G", "0x24GiB", "2x0GB", "-2x24GB", "2x", "2x24GiB,1x8GiB", "9" * 99 + "GB"]
)
def test_what_is_no_gpu_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--gpus must be such as 2x24GiB, 80GB or 8x80GiB, got"):
        Devices.read(text)


@pytest.mark.parametrize("gpus", ["24GiB", "2x24GiB", "8x80GiB", "64x141GB"])
@pytest.mark.parametrize("name", ["7b", "13b", "70b", "135m", "tiny"])
def test_a_report_is_read_in_100_columns(name: str, gpus: str) -> None:
    for stored in (torch.bfloat16, torch.float32):
        text = report(llama(name, gpus, stored), name)
        assert max(map(len, text.splitlines())) <= 100
    long = replace(SHAPES[name], context_length=131072)
    assert max(map(len, report(count_capacity(Spec(args=long, dtype=stored), HOST), name).splitlines())) <= 100


def test_the_command_prints_the_report(
    converted: tuple[Path, str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a source and of a converted folder, and nothing else."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    for path in (converted[0], converted[2]):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoints.py", "--plan", str(path), "--gpus", "2x24GiB"])
        with pytest.raises(SystemExit) as exit:
            main()
        output = capsys.readouterr()
        assert (exit.value.code, output.err) == (0, "")
        spec = open_source(path).reader.spec
        assert output.out == report(count_capacity(spec, Devices.read("2x24GiB")), path) + "\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan"], "--plan needs a folder or a file"),
        (["--plan", "nowhere"], "--plan 'nowhere' does not exist"),
        (["--plan", "x", "--dtype", "bf16"], "--dtype belongs to a conversion: --plan takes --gpus and"),
        (["--plan", "x", "--gpus", "two"], "--gpus must be such as 2x24GiB, 80GB or 8x80GiB, got 'two'"),
        (["--gpus", "80GB"], "--gpus belongs to --plan"),
        (["--original_ckpt_dir", "x"], "--original_ckpt_dir and --save_checkpoint_dir are needed, or --plan"),
    ],
)
def test_a_wrong_flag_is_one_line(command: Any, flags: list[str], message: str) -> None:
    code, lines = command(*flags)
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(f"error: {message}")
