"""The C++ operators are compiled once for a machine and kept while in use; without a compiler plain PyTorch does it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama2.kernels.cpu.library import load_library

ROOT = Path(__file__).parents[3]
COMPILE_ONE = """
from pathlib import Path
from llama2.kernels.cpu import library
def compile(sources, flags, build):
    Path(build, "llama2_cpu.so").touch()
library._compile = compile
library._compiled()
"""


@pytest.mark.integration
def test_without_a_compiler_plain_pytorch_does_the_work(tmp_path: Path) -> None:
    code = (
        "import logging, torch; logging.basicConfig(); from llama2.kernels import choose_kernels\n"
        "print(type(choose_kernels(torch.device('cpu'), torch.bfloat16)).__name__)"
    )
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "/nonexistent/c++"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == "PlainKernels", done.stderr
    assert "decoding is slower" in done.stderr


@pytest.mark.integration
def test_a_first_start_says_that_it_compiles_and_cleans_up_what_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "torchserve-llama2"
    (folder / "tmpkilled" / "part").mkdir(parents=True)
    old, recent = folder / "llama2_cpu-0123.so", folder / "llama2_cpu-4567.so"
    for library, days in ((old, 61), (recent, 59)):
        library.touch()
        os.utime(library, (time.time() - days * 86400,) * 2)
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    first, second = (
        subprocess.run([sys.executable, "-c", COMPILE_ONE], cwd=ROOT, env=environ, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.stderr.splitlines() == [
        "compiling the CPU kernels, once for this machine: this takes half a minute to two minutes",
        "compiled the CPU kernels in 0 s",
    ]
    assert second.stderr == ""
    left = {path.name for path in folder.iterdir()}
    assert {"lock", recent.name} < left
    assert len(left) == 3


@pytest.mark.integration
def test_a_library_that_is_used_is_not_old(tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COMPILE_ONE], cwd=ROOT, env=environ, check=True, capture_output=True)
        (library,) = (tmp_path / "torchserve-llama2").glob("*.so")
        assert time.time() - library.stat().st_mtime < 60
        os.utime(library, (0, 0))


@pytest.mark.integration
def test_the_second_start_compiles_nothing() -> None:
    assert load_library()
    code = "from llama2.kernels.cpu import library as c; c._compile = None; assert c.load_library()"
    subprocess.run([sys.executable, "-c", code], check=True)
