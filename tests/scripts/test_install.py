"""The wheel, installed and used from a folder that knows nothing of the sources."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from scripts.serve import ROOT
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.integration

ARGS = tiny_args(vocab_size=480)
USE = """
import llama2, torch
from llama2 import LLM, SamplingParams
from llama2.kernels import choose_kernels
from llama2.kernels.cpu.kernels import CpuKernels
from llama2.engine.sequence import Request
from llama2.text.grammar import GrammarCompiler
print(llama2.__version__, llama2.__file__)
assert isinstance(choose_kernels(torch.device("cpu"), torch.bfloat16), CpuKernels)
llm = LLM("converted", max_seq_len=64)
rule = GrammarCompiler(llm.tokenizer, 480).regex("[ab]{3}")
request = Request(request_id="0", prompt_ids=(5, 6, 7), params=SamplingParams(max_new_tokens=9), grammar=rule)
print("".join(output.text for output in llm._run([request])[0]))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel in it, and for all else the packages of this one."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(where, "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    sources = folder / "sources"  # a copy: setuptools writes beside what it builds
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
        (sources / name).parent.mkdir(parents=True, exist_ok=True)
        (sources / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-qq"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--ignore-installed", wheel], check=True)
    return python.parent


def test_the_installed_commands_and_operators_work_in_any_folder(installed: Path, tmp_path: Path) -> None:
    def ended(*command: str | Path) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        environ.pop("PYTHONPATH", None)
        return subprocess.run([*map(str, command)], cwd=tmp_path, env=environ, capture_output=True, text=True)

    def run(*command: str | Path) -> str:
        done = ended(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiny_sentencepiece(
        meta_folder(tmp_path / "meta", ARGS, random_weights(ARGS, dtype=torch.bfloat16), num_shards=2), 480
    )
    run(installed / "llama2-convert", "--original_ckpt_dir", "meta", "--save_checkpoint_dir", "converted")
    version, place, text = run(installed / "python", "-c", USE).split()
    assert place.startswith(str(installed.parent))
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert len(text) == 3
    assert set(text) <= {"a", "b"}
    # The archiver is a script of this environment.
    (installed / "torch-model-archiver").symlink_to(Path(sysconfig.get_path("scripts"), "torch-model-archiver"))
    shipped = installed.parent / "lib"
    (config,) = shipped.rglob("model-config.yaml")
    made = run(installed / "llama2-archive", "--config", config, "--checkpoint", "converted", "--model_store", "store")
    assert made.startswith("store/llama is ready")
    assert (tmp_path / "store" / "llama" / "llama2" / "kernels" / "cpu" / "linear.cpp").is_file()
    stopped = ended(installed / "llama2-serve", "--stop")
    assert stopped.returncode == 1
    assert "llama2-serve-8080 is running" in stopped.stderr
