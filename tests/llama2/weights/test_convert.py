"""The command `convert_checkpoints.py` writes a complete folder that holds the source's weights."""

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import write_adapter
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import FairscaleFolder, same_bits
from tests.support.adapters import random_pairs
from tests.support.conversion import ARGS, ROOT, WEIGHTS, assert_holds, flags

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")


def test_plain_python_writes_a_folder_that_is_complete_by_itself(source, tmp_path, command):
    target = tmp_path / "out"
    code, lines = command(*flags(source, target), "--verify")
    assert (code, [line for line in lines if "error" in line]) == (0, [])
    shutil.rmtree(source)
    assert_holds(target)
    assert sorted(path.name for path in target.iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "manifest.json",
        "model_args.json",
        "origin.json",
        "tokenizer.model",
    ]


@pytest.mark.integration
def test_the_readmes_torchrun_command_works_as_typed(source, tmp_path):
    torchrun = Path(sys.executable).with_name("torchrun")
    options = (
        f"--original_ckpt_dir {source} --tokenizer_path {source}/tokenizer.model --model_parallel_size 4 "
        f"--save_checkpoint_dir {tmp_path}/out --max_seq_len 512 --max_batch_size 2"
    )
    launch = [str(torchrun), "--nnodes", "1", "--nproc_per_node", "2", "--standalone", "convert_checkpoints.py"]
    done = subprocess.run([*launch, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "out")
    again = subprocess.run([*launch, *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert again.returncode != 0
    errors = [line for line in again.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: --save_checkpoint_dir {tmp_path}/out exists; --overwrite replaces it"]


def test_dtype_casts_and_verify_compares_with_the_cast_source(source, tmp_path, command):
    assert command(*flags(source, tmp_path / "out"), "--dtype", "fp32", "--verify")[0] == 0
    assert_holds(tmp_path / "out", torch.float32)


def test_back_to_metas_layout_through_the_command(source, tmp_path, command):
    assert command(*flags(source, tmp_path / "dcp"))[0] == 0
    back = ["--output_format", "fairscale", "--output_model_parallel_size", 2, "--verify"]
    assert command(*flags(tmp_path / "dcp", tmp_path / "from_dcp"), *back)[0] == 0
    assert command(*flags(source, tmp_path / "from_meta"), *back)[0] == 0
    for folder in (tmp_path / "from_dcp", tmp_path / "from_meta"):
        result = FairscaleFolder(folder, vocab_size=load_tokenizer(folder).vocab_size, num_shards=2)
        assert all(same_bits(result.read(name).flatten(), weight.flatten()) for name, weight in WEIGHTS.items())


def test_a_tokenizer_of_any_name_comes_along_under_the_expected_name(source, tmp_path, command):
    (source / "tokenizer.model").rename(tmp_path / "my.model")
    assert command(*flags(source, tmp_path / "out"), "--tokenizer_path", tmp_path / "my.model")[0] == 0
    assert_holds(tmp_path / "out")


def test_overwrite_replaces_a_checkpoint(source, tmp_path, command):
    for dtype in ("float16", "bfloat16"):
        assert command(*flags(source, tmp_path / "out"), "--overwrite", "--dtype", dtype)[0] == 0
    assert_holds(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_the_command_merges_an_adapter(source, tmp_path, command):
    pairs = random_pairs(AdapterConfig(target_modules=("k_proj",)), ARGS)
    write_adapter(tmp_path / "adapter", pairs, AdapterConfig(target_modules=("k_proj",)), ARGS)
    code, lines = command(*flags(source, tmp_path / "out"), "--adapter", tmp_path / "adapter", "--onto", "original")
    assert (code, [line for line in lines if "error" in line]) == (0, [])
    expected = WEIGHTS["layers.0.attention.wk.weight"].float() + pairs["layers.0.attention.wk"].delta()
    stored = DcpFolder(tmp_path / "out").read("layers.0.attention.wk.weight")
    assert same_bits(stored.flatten(), expected.bfloat16().flatten())


@pytest.mark.parametrize("merged", [False, True])
def test_no_tensor_is_kept_after_it_is_written(source, tmp_path, monkeypatch, merged):
    """DCP's own writer keeps all tensors of a file, which after a cast are a rank's whole share."""
    if merged:
        write_adapter(tmp_path / "adapter", random_pairs(AdapterConfig(), ARGS), AdapterConfig(), ARGS)
    save = torch.save
    written: list[weakref.ref] = []

    def watch(tensor, stream):
        assert not [reference for reference in written if reference() is not None]
        save(tensor, stream)
        written.append(weakref.ref(tensor))

    monkeypatch.setattr(torch, "save", watch)
    convert(source, tmp_path / "out", dtype=torch.float32, adapter=tmp_path / "adapter" if merged else None)
    assert len(written) > len(WEIGHTS)


def test_verify_notices_a_changed_weight(source, tmp_path, command, monkeypatch):
    save = torch.save
    monkeypatch.setattr(torch, "save", lambda tensor, stream: save(torch.nextafter(tensor, tensor + 1), stream))
    code, lines = command(*flags(source, tmp_path / "out"), "--verify")
    assert code == 1
    assert "verification failed: " in lines[-1]
    assert not (tmp_path / "out").exists()
