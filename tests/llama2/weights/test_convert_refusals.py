"""What cannot be converted is one line on stderr, and exit code 1, and nothing is written."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama2 import LLM
from llama2.weights.convert_command import options
from tests.support.conversion import ROOT, flags

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


def truncate(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def set_tensor(folder: Path, name: str, value: torch.Tensor | None) -> None:
    shard = torch.load(folder / "consolidated.01.pth") | {name: value}
    torch.save({key: tensor for key, tensor in shard.items() if tensor is not None}, folder / "consolidated.01.pth")


def hostile(folder: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "code ran"),))

    torch.save({"norm.weight": Hostile()}, folder / "consolidated.01.pth")


FAULTS: dict[str, tuple[Callable[[Path], object] | None, list, str]] = {
    "a missing shard": (lambda d: (d / "consolidated.02.pth").unlink(), [], "consolidated.02.pth is missing"),
    "a wrong model_parallel_size": (None, ["--model_parallel_size", 8], "consolidated.04.pth is missing"),
    "a truncated shard": (truncate, [], "consolidated.01.pth is not a readable .pth file"),
    "a hostile shard": (hostile, [], "consolidated.01.pth is refused"),
    "another shape": (
        lambda d: set_tensor(d, "output.weight", torch.zeros(9, 9)),
        [],
        "output.weight has shape (9, 9)",
    ),
    "an unknown tensor": (lambda d: set_tensor(d, "lm_head", torch.zeros(9)), [], "unknown tensor 'lm_head'"),
    "a missing tensor": (lambda d: set_tensor(d, "output.weight", None), [], "tensor 'output.weight' is missing"),
    "no tokenizer": (lambda d: (d / "tokenizer.model").unlink(), [], "tokenizer"),
    "an invalid tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"junk"), [], "tokenizer.model"),
    "no folder": (shutil.rmtree, [], "/source' does not exist"),
    "an unknown option": (None, ["--verfy"], "unknown option --verfy: did you mean --verify?"),
    "an argument without an option": (None, ["--verify=True", "here"], "unexpected argument 'here'"),
    "an unknown dtype": (
        None,
        ["--dtype", "int8"],
        "--dtype must be bfloat16 (bf16), float16 (fp16) or",
    ),
    "an unknown format": (
        None,
        ["--output_format", "gguf"],
        "error: --output_format must be one of dcp, fairscale, hf, got 'gguf'",
    ),
    "no size for the way back": (
        None,
        ["--output_format", "fairscale"],
        "--output_format fairscale needs --output_model_parallel_size",
    ),
    "a size that is no number": (None, ["--model_parallel_size", "all"], "must be a positive integer, got 'all'"),
    "onto without an adapter": (
        None,
        ["--onto", "original"],
        "error: --onto says what an adapter is merged into, and there is",
    ),
    "an adapter that is not there": (None, ["--adapter", "/nowhere"], "--adapter must be a folder with adapter_c"),
    "an adapter without a value": (None, ["--adapter"], "--adapter needs a folder"),
    "a switch with a value": (None, ["--overwrite", "3"], "--overwrite is a switch and takes no value, got 3"),
    "too many shards on the way back": (
        None,
        ["--output_format", "fairscale", "--output_model_parallel_size", 3],
        "this model does not split evenly into 3 shards",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_is_one_line_and_exit_code_1_and_leaves_nothing(source, tmp_path, command, fault):
    spoil, extra, message = FAULTS[fault]
    if spoil:
        spoil(source)
    before = sorted(tmp_path.rglob("*"))
    code, lines = command(*flags(source, tmp_path / "out"), *extra)
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    names = [name for name in inspect.signature(options).parameters if "_" in name or name in ("onto", "requantize")]
    assert not re.findall(rf"(?<!--)\b(?:{'|'.join(names)})\b", lines[0]), "an option is not named as it is typed"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "model.safetensors"], "has no tokenizer"),
        (
            ["model.safetensors", "consolidated.00.pth"],
            "holds Meta's files and holds weights in Hugging Face's format: only one",
        ),
        (["readme.md"], "holds no checkpoint: expected Meta's folder"),
        ([], "holds no checkpoint: expected Meta's folder"),
    ],
)
def test_a_folder_that_is_not_read_is_named_whatever_else_it_lacks(tmp_path, command, files, message):
    folder = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    folder.mkdir(exist_ok=True)
    code, lines = command("--original_ckpt_dir", folder, "--save_checkpoint_dir", tmp_path / "out")
    assert code == 1
    assert re.match(f"error: (--original_ckpt_dir ')?{folder}'? .*{message}", lines[0]), lines
    with pytest.raises(
        ValueError,
        match=rf"{folder}' (is no converted checkpoint|holds (Meta's files|weights in Hugging Face's format): convert)",
    ):
        LLM(folder)


@pytest.mark.parametrize("name", ["model.bin", "consolidated.00.pth", "llama-2-7b.Q4_0.gguf"])
def test_a_file_that_is_not_read_is_named(tmp_path, command, name):
    (tmp_path / name).write_bytes(b"GGUF")
    code, lines = command("--original_ckpt_dir", tmp_path / name, "--save_checkpoint_dir", tmp_path / "out")
    assert code == 1
    assert re.match(
        f"error: --original_ckpt_dir '{tmp_path / name}' is a file; expected|"
        f"error: {tmp_path / name} is not a whole GGUF",
        lines[0],
    )


@pytest.mark.integration
@pytest.mark.parametrize("processes", [1, 3])
def test_under_torchrun_an_error_is_one_line_of_one_rank(tmp_path, processes):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--original_ckpt_dir", "Llama-2-7b", "--save_checkpoint_dir", str(tmp_path / "out")]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}  # else torchrun itself has something to say
    done = subprocess.run(
        [*launch, str(ROOT / "convert_checkpoints.py"), *options],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.stderr == "error: --original_ckpt_dir 'Llama-2-7b' does not exist\n"
    assert done.returncode not in (0, None)


@pytest.mark.parametrize(
    ("place", "extra", "message"),
    [
        ("checkpoint", [], "exists; --overwrite replaces it"),
        ("holiday photos", ["--overwrite"], "holds no checkpoint: choose another name"),
        ("holiday photos", [], "holds no checkpoint: choose another name"),
        ("file", ["--overwrite"], "is a file"),
        ("file/out", [], "/file'"),
        ("source", ["--overwrite"], "must not be or contain --original_ckpt_dir"),
        (".", ["--overwrite"], "must not be or contain --original_ckpt_dir"),
    ],
)
def test_a_target_that_must_not_be_replaced_is_left_alone(source, tmp_path, command, place, extra, message):
    for name in ("checkpoint/model_args.json", "holiday photos/1.jpg", "file"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    code, lines = command(*flags(source, tmp_path / place), *extra)
    assert (code, len(lines)) == (1, 1), lines
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
