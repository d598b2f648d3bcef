"""The user's mask of GPUs reaches a worker past TorchServe, which would count GPUs from 0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from handler.torchserve import gpu_mask
from tests.handler.support import ROOT


@pytest.mark.parametrize(
    ("mask", "own", "selected"),
    [
        ("4,5", "0,1", "4,5"),
        ("4,5,6,7", "2,3", "6,7"),  # deviceIds in the yaml
        ("GPU-8f1c, GPU-77aa", "1", "GPU-77aa"),
        ("4,5", None, "4,5"),  # TorchServe has found no GPUs, or was told deviceType: cpu
        ("4,-1,5", "0", "4"),
        ("", "0,1", ""),
        ("-1", "0,1", ""),
    ],
)
def test_torchserves_count_selects_from_the_users_mask(mask: str, own: str | None, selected: str) -> None:
    environ = {gpu_mask.VARIABLE: mask} | ({} if own is None else {"CUDA_VISIBLE_DEVICES": own})
    gpu_mask.restore(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": selected}


@pytest.mark.parametrize(("mask", "own"), [("4", "0,1"), ("4,-1,5", "1"), ("4,5", "GPU-8f1c")])
def test_a_mask_that_is_too_short_is_named_with_what_was_asked_of_it(mask: str, own: str) -> None:
    with pytest.raises(ValueError, match=f"LLAMA_VISIBLE_DEVICES={mask} names . GPUs, but .* index {own}: .*nproc"):
        gpu_mask.select(mask, own)


def test_a_worker_without_a_users_mask_keeps_torchserves() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "0,1"}
    gpu_mask.restore(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    ("environ", "started"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5"}, {"LLAMA_VISIBLE_DEVICES": "4,5"}),
        ({"CUDA_VISIBLE_DEVICES": ""}, {"LLAMA_VISIBLE_DEVICES": ""}),
        ({"LLAMA_VISIBLE_DEVICES": "4"}, {"LLAMA_VISIBLE_DEVICES": "4"}),
        ({}, {}),
    ],
    ids=str,
)
def test_torchserve_starts_without_cudas_own_mask(environ: dict[str, str], started: dict[str, str]) -> None:
    assert gpu_mask.set_aside({"PATH": "/bin", **environ}) == {"PATH": "/bin", **started}


WORKER = """
import os, sys, types
from handler.torchserve.llama_handler import LlamaHandler
context = types.SimpleNamespace(system_properties={"model_dir": "."}, model_yaml_config={})
try:
    LlamaHandler().initialize(context)
except RuntimeError as error:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), error)
"""


@pytest.mark.integration
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("6,GPU-8f1c", "6,GPU-8f1c the model cannot be served: model-config.yaml: "),
        ("6", "0,1 the model cannot be served: LLAMA_VISIBLE_DEVICES=6 names 1 GPUs"),
    ],
)
def test_a_worker_puts_the_masks_together_before_it_does_anything_else(mask: str, words: str, tmp_path: Path) -> None:
    environ = {**os.environ, "LLAMA_VISIBLE_DEVICES": mask, "CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORKER], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(words), done.stdout + done.stderr
