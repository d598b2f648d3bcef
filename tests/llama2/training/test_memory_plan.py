"""The plan says what a run takes: compared with a real one, and with what a GPU of 8 GB has for 7B."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.adapters.format import targets
from llama2.config import ModelArgs
from llama2.training.memory_plan import check, reserve
from llama2.weights.precision import target
from llama2.weights.spec import Spec
from tests.support.training import options

ROOT = Path(__file__).parents[3]
LLAMA_7B = ModelArgs.from_params({"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "vocab_size": 32000})
# One step on its own, in a process whose peak is known: prints the plan's bytes for the step, what of these malloc may
# keep, and those that it took.
STEP = """
import sys
from pathlib import Path
import torch
from llama2.adapters.format import targets
from llama2.training.memory_plan import reserve
from llama2.weights.readers.dcp import DcpFolder
from tests.support.checkpoints import write_checkpoint
from tests.support.training import options, open_passes, random_samples
from tests.support.weights import random_weights, tiny_args

args = tiny_args(dim=1024, n_layers=6, n_heads=16, n_kv_heads=8, multiple_of=256, vocab_size=4096)
folder = write_checkpoint(Path(sys.argv[1]), args, random_weights(args))
config = options(max_length=512, batch_size=4, gradient_checkpointing=sys.argv[2] == "True")
passes, adapter = open_passes(folder, config)
spec, wanted = DcpFolder(folder).spec, targets(config.adapter_config(), args)
passes.losses(random_samples([4], 4096)).sum().backward()

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

samples = random_samples([512] * 4, 4096)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
before = status("VmRSS")
passes.losses(samples).sum().backward()
plan = reserve(spec, wanted, config, dtype=torch.float32, degree=1, device="cpu")
step = sum(plan.values()) - plan["weights"] - plan["adapter and optimizer"]
print(step, plan["freed memory that the process keeps"], status("VmHWM") - before)
"""


def plan(args: ModelArgs, *, quantize: str | None = None, degree: int = 1, **changes: Any) -> dict[str, int]:
    config = options(max_length=512, **changes)
    spec = target(Spec(args=args, dtype=torch.bfloat16), quantize=quantize)
    wanted = targets(config.adapter_config(), args)
    return reserve(spec, wanted, config, dtype=torch.bfloat16, degree=degree, device="cuda")


def test_7b_in_nf4_fits_on_a_gpu_of_8_gb() -> None:
    assert sum(plan(LLAMA_7B, quantize="nf4").values()) < 8e9
    assert sum(plan(LLAMA_7B, quantize="nf4", preset="seed001", rank=64).values()) < 8e9
    assert sum(plan(LLAMA_7B, quantize="nf4", rank=64, optimizer="paged_adamw_8bit").values()) < 8e9
    assert sum(plan(LLAMA_7B, quantize="nf4_double").values()) < 5.9e9
    assert sum(plan(LLAMA_7B).values()) > 14e9


def test_ranks_share_the_weights() -> None:
    alone, shared = plan(LLAMA_7B), plan(LLAMA_7B, degree=2)
    assert shared["weights"] == pytest.approx(alone["weights"] / 2, rel=0.01)
    assert shared["one layer"] < alone["one layer"]
    assert shared["inputs of layers"] == alone["inputs of layers"]


def test_what_does_not_fit_is_refused_with_what_to_change() -> None:
    config = options(max_length=512, gradient_checkpointing=False)
    reserved = plan(LLAMA_7B, gradient_checkpointing=False)
    check(reserved, sum(reserved.values()), config)
    with pytest.raises(ValueError, match=r"needs \d+ MiB, and \d+ MiB are free: weights") as caught:
        check(reserved, sum(reserved.values()) - 1, config)
    for advice in ("gradient_checkpointing: true", "a smaller batch_size", "--quantize nf4_double", "more ranks"):
        assert advice in str(caught.value)


@pytest.mark.integration
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("returns", [True, False], ids=["malloc returns what is free", "malloc as it is"])
def test_a_step_takes_what_the_plan_says(checkpointing: bool, returns: bool, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STEP, str(tmp_path / "checkpoint"), str(checkpointing)]
    environ = {**os.environ, **({"MALLOC_MMAP_THRESHOLD_": str(1 << 20)} if returns else {})}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    planned, by_malloc, taken = map(int, done.stdout.split())
    if returns:
        planned -= by_malloc
        assert taken > planned / 2
    assert taken < planned
