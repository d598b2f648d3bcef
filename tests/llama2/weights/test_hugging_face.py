"""A Hugging Face folder is the model that transformers makes of it, however its files are cut."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2 import LLM
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.fairscale import same_bits
from llama2.weights.source import open_source
from tests.support.hugging_face import LLAMA3_ROPE, as_pickles, edit_json, save_model

ROOT = Path(__file__).parents[3]
IDS = torch.arange(3, 203).tolist()


def logits(folder: Path) -> torch.Tensor:
    with LLM(folder, max_seq_len=256, dtype="float32") as llm:
        return llm.score(IDS)


def assert_same_weights(one: Path, other: Path) -> None:
    left, right = (open_source(folder).reader for folder in (one, other))
    assert left.spec == right.spec
    for name in left.spec.tensors():
        assert same_bits(left.read(name), right.read(name)), name


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"num_key_value_heads": 4}),
        ("llama", {}),
        ("llama", {"head_dim": 32, "rope_parameters": LLAMA3_ROPE}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("mistral", {"sliding_window": 256}),
    ],
    ids=["MHA", "GQA", "llama3 rope", "linear rope", "tied", "mistral", "mistral, window as long as the context"],
)
def test_logits_are_those_of_transformers(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    model = save_model(tmp_path / "hf", kind=kind, **config)
    convert(tmp_path / "hf", tmp_path / "out", verify=True)
    with torch.inference_mode():
        theirs = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "out"), theirs, rtol=0, atol=1e-4)


def test_a_config_of_earlier_versions_describes_the_same_model(tmp_path: Path) -> None:
    save_model(tmp_path / "new", head_dim=32, rope_parameters=LLAMA3_ROPE)
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    older = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    edit_json(tmp_path / "old" / "config.json", rope_parameters=..., rope_theta=1000.0, rope_scaling=older)
    assert_same_weights(tmp_path / "new", tmp_path / "old")
    args = open_source(tmp_path / "old").reader.spec.args
    assert args.scaled_rope is not None
    assert (args.rope_theta, args.scaled_rope.original_context_length, args.context_length) == (1000.0, 32, 256)


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_it_does_not_matter_how_the_tensors_are_filed(tmp_path: Path, pickled: bool, sharded: bool) -> None:
    save_model(tmp_path / "plain", dtype=torch.bfloat16)
    save_model(tmp_path / "other", dtype=torch.bfloat16, shard_size="100KB" if sharded else "5GB")
    if pickled:
        as_pickles(tmp_path / "other")
    assert len(list((tmp_path / "other").glob("*.bin" if pickled else "*.safetensors"))) in (
        [2, 3, 4] if sharded else [1]
    )
    assert_same_weights(tmp_path / "plain", tmp_path / "other")


def test_one_file_is_read_with_the_config_beside_it(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    assert_same_weights(tmp_path / "hf", tmp_path / "hf" / "model.safetensors")


def test_links_may_lead_out_of_the_folder_as_in_the_hubs_cache(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", shard_size="100KB")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "hf").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_same_weights(tmp_path / "hf", tmp_path / "snapshot")


def test_buffers_that_older_versions_saved_are_left_out(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    shutil.copytree(tmp_path / "hf", tmp_path / "old")
    as_pickles(tmp_path / "old")
    state = torch.load(tmp_path / "old" / "pytorch_model.bin")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8, dtype=torch.float64)
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    assert_same_weights(tmp_path / "hf", tmp_path / "old")


def test_dtypes_that_differ_are_held_exactly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path / "hf", dtype=torch.bfloat16)
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"] = torch.full((64,), 1 / 3)
    save_file(state, path)
    convert(tmp_path / "hf", tmp_path / "out", verify=True)
    stored = DcpFolder(tmp_path / "out")
    assert stored.spec.dtype == torch.float32
    assert torch.equal(stored.read("norm.weight"), state["model.norm.weight"])
    assert torch.equal(stored.read("tok_embeddings.weight"), state["model.embed_tokens.weight"].float())


def test_the_tokenizer_and_what_ends_a_reply_come_along(tmp_path: Path) -> None:
    save_model(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "A", "eos_token": "</s>"}))
    convert(tmp_path / "hf", tmp_path / "out")
    with LLM(tmp_path / "out", max_seq_len=64) as llm:
        assert llm.tokenizer.eos_ids == {2, 7}
        assert llm.tokenizer.chat_template == "A"


WATCHED = """
import sys
from llama2.weights.convert import convert
from llama2.weights.readers.hugging_face import HuggingFaceFolder

def own_bytes():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch(self, name):
    values = read(self, name)
    held.append(own_bytes())
    return values

held, read = [own_bytes()], HuggingFaceFolder.read
HuggingFaceFolder.read = watch
convert(sys.argv[1], sys.argv[2], output_format=sys.argv[3])
print(max(held) - held[0], len(held) - 1)
"""


@pytest.mark.integration
@pytest.mark.parametrize("output_format", ["dcp", "hf"])
def test_tensors_are_mapped_and_none_is_kept(tmp_path: Path, output_format: str) -> None:
    """A conversion holds less than three times the largest tensor, which is a tenth of the file."""
    save_model(
        tmp_path / "hf",
        dtype=torch.bfloat16,
        vocab_size=5000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
    )
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "hf"), str(tmp_path / "out"), output_format]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    grown, reads = map(int, done.stdout.split())
    assert reads >= 4 * 9 + 3
    largest = 5000 * 1024 * 2
    assert grown < 3 * largest < (tmp_path / "hf" / "model.safetensors").stat().st_size / 3


@pytest.mark.integration
def test_two_processes_convert_it_under_torchrun(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", dtype=torch.bfloat16, shard_size="100KB")
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--standalone"]
    options = f"--original_ckpt_dir {tmp_path}/hf --save_checkpoint_dir {tmp_path}/out --verify".split()
    done = subprocess.run(
        [*torchrun, "convert_checkpoints.py", *options], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert_same_weights(tmp_path / "hf", tmp_path / "out")
