"""What every test may ask for: the demo's model, written and converted once. And when marked tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    # Tests run several processes on few cores; torch reads this at its import, and children inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`slow` tests run when they are asked for by -m, `gpu` tests where there is a GPU."""
    expression = config.getoption("-m")
    for item in items:
        if item.get_closest_marker("slow") and "slow" not in expression:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def smollm2_meta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as Meta would have published it, in 3 shards."""
    folder = tmp_path_factory.mktemp("smollm2") / "meta"
    _run("-m", "scripts.smollm2", "--output_dir", str(folder), "--num_shards", "3")
    return folder


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_meta: Path) -> Path:
    """The same, converted by two processes."""
    folder = smollm2_meta.parent / "converted"
    _run(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "convert_checkpoints.py"),
        *("--original_ckpt_dir", str(smollm2_meta), "--tokenizer_path", str(smollm2_meta)),
        *("--save_checkpoint_dir", str(folder)),
    )
    return folder


def _run(*arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
