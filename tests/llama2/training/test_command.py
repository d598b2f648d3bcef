"""The command: one line for a mistake, and the same run by torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama2.adapters.format import read_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.training import write_samples
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
ARGS = tiny_args(vocab_size=509)


def write_config(folder: Path, **changes: object) -> Path:
    tokenizer_file = tiny_sentencepiece(folder, vocab_size=509)
    checkpoint = write_checkpoint(folder / "checkpoint", ARGS, random_weights(ARGS), tokenizer_file)
    samples = write_samples(folder / "samples.jsonl")
    values = {"checkpoint_dir": str(checkpoint), "data": str(samples), "output_dir": str(folder / "out"), **changes}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    return folder / "run.yaml"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    done = run("finetune.py", write_config(tmp_path, learning_rat=0.1))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path}/run.yaml: learning_rat is an unknown key: did you mean 'learning_rate'?\n"
    )


@pytest.mark.parametrize(
    ("flags", "last"),
    [([], "error: {}/run.yaml: learning_rat is an unknown key: did you mean 'learning_rate'?"),
     (["--resum"], "finetune.py: error: unrecognized arguments: --resum")],
)  # fmt: skip
def test_so_it_is_under_torchrun_without_a_report_of_its_own(tmp_path: Path, flags: list[str], last: str) -> None:
    config = write_config(tmp_path, learning_rat=0.1)
    done = run("-m", "torch.distributed.run", "--nproc_per_node", 2, "finetune.py", config, *flags)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == last.format(tmp_path)
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr


def test_lines_come_before_the_bar_or_above_it(tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=2, validation_fraction=0.2, max_length=64)
    done = run("finetune.py", config, "--resume")
    assert done.returncode == 0, done.stderr
    out = done.stderr.partition("training:")[0]
    assert f"there is no checkpoint in {tmp_path}/out: the run begins anew\n" in out
    assert "48 samples in 14 rows of at most 64 tokens; a step takes up to 8 rows: 4 steps in 2 epochs\n" in out
    measured = [line.split("\r")[-1] for line in done.stderr.split("\n") if "validation loss" in line]
    assert [line.partition(":")[0] for line in measured] == ["step 2", "step 4"]


def test_torchrun_trains_and_resumes(tmp_path: Path) -> None:
    config = write_config(tmp_path, epochs=2, save_steps=1)
    done = run("-m", "torch.distributed.run", "--nproc_per_node", 2, "finetune.py", config)
    assert done.returncode == 0, done.stderr
    assert "memory of each rank: " in done.stderr
    assert "tok/s" in done.stderr
    assert f"{tmp_path}/out/adapter, after 2 steps" in done.stderr
    assert read_adapter(tmp_path / "out" / "adapter", ARGS).rank == 8
    again = run("-m", "torch.distributed.run", "--nproc_per_node", 2, "finetune.py", config)
    assert again.returncode != 0
    assert "has checkpoints: go on with --resume" in again.stderr.splitlines()[-1]
    resumed = run("-m", "torch.distributed.run", "--nproc_per_node", 2, "finetune.py", config, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 2 of 2" in resumed.stderr
