"""What `benchmarks/gpu.sh` runs fits into its time, is left out by name where something is missing, and ends."""

from __future__ import annotations

import importlib
import importlib.util
import json
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_steps
from benchmarks.gpu_steps import GPU_TESTS, SECONDS, STEPS, Step
from tests.support.bare_python import ROOT, run_bare

# The longest that a rented machine lets one command run.
MACHINE_SECONDS = 600


def test_the_limits_fit_into_the_time() -> None:
    assert sum(step.limit for step in STEPS) <= SECONDS
    # At most two waits for what does not end, and half a minute for the start and for packing.
    assert SECONDS + 2 * gpu_steps.GRACE + 30 <= MACHINE_SECONDS


@pytest.mark.parametrize("step", [step for step in STEPS if step.name != "tests"], ids=lambda step: step.name)
def test_each_command_is_understood_by_its_module(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only parsed: nothing could be measured on this machine."""
    for _, module, *arguments in step.commands:
        parsed = importlib.import_module(module).parser().parse_args(arguments)
        assert parsed.out == Path("OUT")


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_all_that_the_command_runs_can_be_imported() -> None:
    """For the peers, what calls them: they are other programs."""
    modules = [
        *("gpu_steps", "gpu_run", "gpu_kernels", "gpu_peers", "gpu_report", "profiles"),
        *(f"sweeps.{path.stem}" for path in (ROOT / "benchmarks" / "sweeps").glob("*.py")),
    ]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module('benchmarks.' + name)"
    done = run_bare(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.integration
def test_its_tests_are_there_and_pass_or_skip_where_little_is_installed() -> None:
    """Without a GPU each skips; a test that does not exist, or needs more than this, fails the run."""
    code = "import pytest\nsys.exit(pytest.main(sys.argv[1:]))"
    done = run_bare(code, "-q", *GPU_TESTS, there=("pytest", "sentencepiece"), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert done.returncode == 0, done.stdout + done.stderr
    if not _has_gpu():
        assert " skipped" in done.stdout
        assert "passed" not in done.stdout


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LEAST": 0, "GRACE": 1, "SECONDS": 6, "OPTIONAL": ("pytest", "no_such_package")}.items():
        monkeypatch.setattr(gpu_steps, name, value)


def test_steps_run_in_turn_and_all_that_they_left_is_packed(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = "{'x': {'not_run': 'no'}}"
    put = f"from benchmarks.gpu_report import GpuReport as R; import sys; R('OUT').put('peers', {{}}, {peers})"
    steps = [
        Step(name="writes", limit=2, commands=(("-c", f"{put}; print('all is well'); sys.exit(3)"),)),
        Step(name="needs", limit=1, commands=(("-c", "1 / 0"),), needs=("no_such_package", "pytest")),
        Step(name="both", limit=1, commands=(("-c", "print('left')"), ("-c", "print('right')"))),
    ]
    gpu_steps.main([str(tmp_path / "deep" / "gpu")], steps)
    printed = capsys.readouterr().out
    assert "not installed: no_such_package\n" in printed
    assert "needs is left out: not installed: no_such_package\n" in printed
    assert all(word in printed for word in ("all is well", "left", "right", "x: no"))
    content = json.loads((tmp_path / "deep" / "gpu" / "gpu.json").read_text())
    statuses = [step.get("exit_status") for step in content["figures"]["steps"]["steps"]]
    assert statuses == [3, None, 0]
    assert content["figures"]["peers"] == {"x": {"not_run": "no"}}
    with tarfile.open(tmp_path / "deep" / "gpu.tar.gz") as archive:
        names = {Path(name).name for name in archive.getnames()}
    assert names == {"gpu", "gpu.json", "gpu.txt", "writes.log", "both-0.log", "both-1.log"}


@pytest.mark.integration
def test_a_step_that_does_not_end_is_ended_with_its_children_and_the_next_one_runs(quick: None, tmp_path: Path) -> None:
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', CHILD]); time.sleep(60)"
    writes = f"import time, pathlib\nwhile True: pathlib.Path({str(tmp_path / 'alive')!r}).touch(); time.sleep(0.05)"
    steps = [
        Step(name="hangs", limit=4, commands=(("-c", child.replace("CHILD", repr(writes))),)),
        Step(name="next", limit=2, commands=(("-c", "print('here')"),)),
    ]
    started = time.monotonic()
    gpu_steps.main([str(tmp_path / "gpu")], steps)
    assert time.monotonic() - started < 15
    assert (tmp_path / "gpu" / "next.log").read_text() == "here\n"
    assert (tmp_path / "alive").exists()
    (tmp_path / "alive").unlink()
    time.sleep(0.5)
    assert not (tmp_path / "alive").exists(), "the child lives"
    hangs, after = json.loads((tmp_path / "gpu" / "gpu.json").read_text())["figures"]["steps"]["steps"]
    assert hangs["exit_status"] == -15
    assert after["exit_status"] == 0


def test_a_step_gets_the_time_that_the_last_one_left(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "SECONDS", 90)
    steps = [Step(name=name, limit=30, commands=(("-c", ""),)) for name in ("first", "second", "third")]
    gpu_steps.main([str(tmp_path / "gpu")], steps)
    content = json.loads((tmp_path / "gpu" / "gpu.json").read_text())["figures"]["steps"]
    first, second, third = (step["limit_s"] for step in content["steps"])
    assert first <= 30 < second <= 60 < third <= 90
