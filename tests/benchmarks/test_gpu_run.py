"""The engine's part of `benchmarks/gpu.sh`, on a tiny model and a CPU, with torch and numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.bare_python import run_bare

pytestmark = pytest.mark.integration

QUICK = """
from benchmarks import ceilings
ceilings.SECONDS, ceilings.BUFFER_BYTES, ceilings.PRODUCT_SIZES = 0.01, 1 << 20, {"cpu": (256,)}
"""
SETTINGS = (
    *("--shape", "tiny", "--device", "cpu", "--dtype", "fp32", "--cells", "1x8,3x40", "--rounds", "2"),
    *("--new_tokens", "4", "--profiles", "1,3", "--profile_context", "20", "--profile_prompt", "60"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    code = f"{QUICK}\nimport benchmarks.gpu_run\nbenchmarks.gpu_run.main(sys.argv[1:])"
    done = run_bare(code, *SETTINGS, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "gpu.json").read_text())["figures"]["engine tiny"]
    return content


def test_every_cell_has_a_row_with_its_rounds_and_limits(engine: dict[str, Any]) -> None:
    assert [(row["batch"], row["context"], len(row["rounds"])) for row in engine["rows"]] == [(1, 8, 2), (3, 40, 2)]
    for row in engine["rows"]:
        for what in ("prefill", "decode"):
            limit, reached = row[f"{what}_limit_tokens_per_second"], row[f"{what}_tokens_per_second"]
            assert row[f"{what}_percent_of_limit"] == pytest.approx(100 * reached / limit)


def test_the_profiles_name_what_ran(engine: dict[str, Any]) -> None:
    profiles = engine["profiles"]
    assert list(profiles) == ["decode 1x20", "decode 3x20", "prefill 1x60"]
    assert [one["steps"] for one in profiles.values()] == [3, 3, 1]
    for one in profiles.values():
        # Four products in each of two layers, and the head's.
        assert sum(kernel["calls_per_step"] for kernel in one["kernels"] if "linear" in kernel["name"]) >= 9


def test_the_start_is_timed_and_all_figures_are_in_the_table(folder: Path, engine: dict[str, Any]) -> None:
    start = engine["start"]
    assert start["ready_seconds"] >= start["model_seconds"] + start["engine_seconds"] > 0
    text = (folder / "gpu.txt").read_text()
    for row in engine["rows"]:
        assert f"{row['decode_tokens_per_second']:,.0f}" in text
    assert "tiny, prefill 1x60, ms per step" in text


def test_a_cell_beyond_memory_is_named_and_one_model_does_not_replace_another(folder: Path) -> None:
    """One has no memory left for its cache; the other's figures stay."""
    small = """
from dataclasses import replace
import benchmarks.gpu_run as gpu_run
fit = gpu_run.fit_memory
gpu_run.fit_memory = lambda args, config, **rest: replace(fit(args, config, **rest), kv_memory_fraction=1e-9)
gpu_run.SHAPES = {"other": gpu_run.SHAPES["tiny"]}
import llama2.engine.loading as loading
loading.count_blocks = lambda *args, **rest: 8
gpu_run.main(sys.argv[1:])
"""
    arguments = ("--shape", "other", *SETTINGS[2:], "--profile_context", "50", "--out", str(folder))
    done = run_bare(QUICK + small, *arguments)
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "gpu.json").read_text())["figures"]
    assert list(figures) == ["engine tiny", "engine other"]
    assert [row.get("skipped") for row in figures["engine other"]["rows"]] == [
        None, "memory holds 128 tokens of KV cache, not 144"
    ]  # fmt: skip
    assert figures["engine other"]["profiles"]["decode 3x50"] == {
        "left_out": "memory holds 128 tokens of KV cache, not 192"
    }


def test_without_ninja_plain_pytorch_computes(tmp_path: Path) -> None:
    """And where no earlier run left a library."""
    code = """
import os, torch
sys.executable = "/nowhere/python"
os.environ["PATH"] = "/nowhere"
from llama2.kernels import choose_kernels
print(type(choose_kernels(torch.device("cpu"), torch.bfloat16)).__name__)
"""
    done = run_bare(code, XDG_CACHE_HOME=str(tmp_path))
    assert done.stdout == "PlainKernels\n", done.stderr
    assert "the CPU kernels are not used" in done.stderr
