"""The sweeps of kernels, in Triton's interpreter on a CPU: every part has rows, or says why it cannot run."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.limits import Rates
from benchmarks.sweeps import bench as bench_module
from benchmarks.sweeps.bench import Bench
from tests.support.bare_python import run_bare

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
RATES = Rates(bytes_per_second=1e9, flops_per_second=1e12)


def make_bench(rows: list[dict[str, Any]], **settings: Any) -> Bench:
    settings = {"deadline": time.monotonic() + 60, **settings}
    return Bench(torch.device("cpu"), torch.float32, RATES, keep=rows.append, **settings)


def test_a_row_has_its_rate_and_its_share_of_the_ceiling() -> None:
    rows: list[dict[str, Any]] = []
    bench = make_bench(rows)
    bench.row("sleep", lambda: [lambda: time.sleep(0.01)], nbytes=1_000_000, tile=4)
    bench.row("sleep", lambda: [lambda: time.sleep(0.01)], flop=10**9)
    for row, unit, expected in ((rows[0], "GB/s", 0.1), (rows[1], "TFLOP/s", 0.1)):
        assert row["microseconds"] == pytest.approx(10_000, rel=0.5)
        assert row["unit"] == unit
        assert row["rate"] == pytest.approx(expected, rel=0.5)
    assert rows[0]["kernel"] == "sleep tile=4"
    assert rows[0]["percent_of_ceiling"] == pytest.approx(10, rel=0.5)


def test_buffers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, more than its cache can hold; on a CPU, one."""
    called: list[int] = []
    make_bench([]).row("turns", lambda: [lambda index=index: called.append(index) for index in range(3)])  # type: ignore[misc]
    assert called[1:] == [index % 3 for index in range(bench_module.REPLAYS)]
    on_gpu = make_bench([])
    on_gpu.device = torch.device("cuda")
    assert on_gpu.copies(100 << 20) * (100 << 20) >= 4 * (60 << 20)
    assert on_gpu.copies(1 << 40) == 1


def test_what_fails_or_is_left_no_time_is_named() -> None:
    rows: list[dict[str, Any]] = []
    make_bench(rows).row("fails", lambda: [lambda: 1 // 0])
    make_bench(rows, deadline=0).row("late", lambda: pytest.fail("ran"))
    assert rows == [
        {"kernel": "fails", "left_out": "ZeroDivisionError: integer division or modulo by zero"},
        {"kernel": "late", "left_out": "no time left"},
    ]


def test_compilers_share_the_kernels_and_time_none() -> None:
    called: list[int] = []
    for share in range(3):
        bench = make_bench([], compiles=(share, 3))
        for index in range(7):
            bench.row("one", lambda index=index: [lambda: called.append(index)])  # type: ignore[misc]
    assert sorted(called) == list(range(7))


SWEEP = """
import torch
from benchmarks import ceilings, gpu_kernels
from benchmarks.sweeps import attention, bench, products
ceilings.SECONDS, ceilings.BUFFER_BYTES, ceilings.PRODUCT_SIZES = 0.01, 1 << 20, {"cpu": (64,)}
bench.REPLAYS = 1
products.ROWS, products.STREAMED_ROWS, products.VARIED_ROWS = (1, 2), (2,), (1,)
products.VARIANTS = products.VARIANTS[:1] + products.VARIANTS[-1:]
attention.DECODING = attention.VARIED_DECODING = attention.PROMPTS = attention.VARIED_PROMPTS = ((2, 20),)
attention.DECODING_VARIANTS = attention.DECODING_VARIANTS[:3]
attention.PROMPT_VARIANTS = attention.PROMPT_VARIANTS[:1]
gpu_kernels.main([*sys.argv[1:], "--compile", "0", "--compilers", "9"])
print("compiled")
gpu_kernels.main(sys.argv[1:])
"""


@pytest.mark.integration
@needs_triton
def test_every_part_is_measured_and_written(tmp_path: Path) -> None:
    arguments = ("--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--seconds", "300", "--out", str(tmp_path))
    done = run_bare(SWEEP, *arguments, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("compiled\nwqkv, 1 rows, torch: "), "compilers measure nothing"
    content = json.loads((tmp_path / "gpu.json").read_text())["figures"]["kernels"]
    assert [row for row in content["rows"] if "left_out" in row] == []
    names = [row["kernel"] for row in content["rows"]]
    assert len(set(names)) == len(names)
    for part in (
        "w2, 1 rows, torch",
        "output, 2 rows, Triton",
        "w13, 1 rows, tried N=1",
        "w2, 2 rows, Triton in three axes",
        "w13 gated, 2 rows",
        "nucleus_floor, 1 rows",
        "decode, 2 of 20, Triton",
        "silu_mul",
    ):
        assert any(name.startswith(part) for name in names), part
    for part in (
        "decode, 2 of 20, tried axes=shl",
        "prompts, 2 of 20, torch SDPA",
        "prompts, 2 of 20, tried M=64",
        "Sampler, top_p",
    ):
        assert any(name.startswith(part) for name in names), part
    assert "left out" not in (tmp_path / "gpu.txt").read_text()


EQUAL = """
import torch
from benchmarks.sweeps.attention import DECODING_VARIANTS, PROMPT_VARIANTS
from benchmarks.sweeps.products import VARIANTS
from benchmarks.sweeps.former_product import linear
from llama2.kernels.cuda import decode_attention, prefill_attention, products

torch.manual_seed(0)
sequences, context, heads, kv_heads, dim, block = 2, 300, 4, 2, 16, 16
blocks = -(-context // block)
keys, values = (torch.randn(sequences * blocks, block, kv_heads, dim) for _ in range(2))
tables = torch.randperm(sequences * blocks).int().view(sequences, blocks)
contexts = torch.tensor([context, 40], dtype=torch.int32)

def attended(attend, lengths, settings):
    settings = {name: value for name, value in settings.items() if name not in ("pdl", "maxnreg")}
    caches = [keys, values]
    if settings.pop("heads_apart", False):
        caches = [cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches]
    starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
    q = torch.randn(sum(lengths), heads, dim, generator=torch.Generator().manual_seed(1))
    out = torch.zeros_like(q)
    state = torch.zeros(4, dtype=torch.int32) if attend is decode_attention.attend_decode else 0
    attend(q, *caches, tables, contexts, starts, state, out, **settings)
    return out

for variants, attend, lengths in (
    (DECODING_VARIANTS, decode_attention.attend_decode, (1, 1)),
    (PROMPT_VARIANTS, prefill_attention.attend_prefill, (70, 9)),
):
    expected = attended(attend, lengths, {})
    for settings in variants:
        torch.testing.assert_close(attended(attend, lengths, settings), expected, atol=1e-5, rtol=1e-5)
x, weight = torch.randn(2, 1100), torch.randn(6, 1100)
for settings in VARIANTS:
    found = products.linear(x, weight, **{**settings, "pdl": False})
    torch.testing.assert_close(found, x @ weight.T, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(linear(x, weight), x @ weight.T, atol=1e-4, rtol=1e-4)
"""


@pytest.mark.integration
@needs_triton
def test_every_variant_computes_the_same() -> None:
    done = run_bare(EQUAL, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
