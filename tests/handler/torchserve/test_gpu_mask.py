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
    ("mask", "visible"),
    [("4,5", "4,5"), ("GPU-8f1c, GPU-77aa", "GPU-8f1c,GPU-77aa"), ("4,-1,5", "4"), ("", ""), ("-1", "")],
)
def test_a_worker_sees_the_users_mask(mask: str, visible: str) -> None:
    environ = {gpu_mask.VARIABLE: mask}
    gpu_mask.restore(environ)
    assert environ == {"CUDA_VISIBLE_DEVICES": visible}


def test_a_worker_without_a_users_mask_sees_all_that_there_is() -> None:
    environ: dict[str, str] = {}
    gpu_mask.restore(environ)
    assert environ == {}


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
def test_a_worker_restores_the_mask_before_it_does_anything_else(tmp_path: Path) -> None:
    environ = {**os.environ, "LLAMA_VISIBLE_DEVICES": "6,GPU-8f1c", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", WORKER], env=environ, cwd=tmp_path, capture_output=True, text=True)
    words = "6,GPU-8f1c the model cannot be served: model-config.yaml: "
    assert done.stdout.startswith(words), done.stdout + done.stderr
