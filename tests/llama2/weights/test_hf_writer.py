"""What is written in Hugging Face's format is the model, for transformers and for our own reader, to the bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama2.weights.convert import convert
from llama2.weights.hf_writer import HuggingFaceWriter
from llama2.weights.readers.fairscale import same_bits
from llama2.weights.source import open_source
from scripts.smollm2 import gguf_file
from tests.support.hugging_face import LLAMA3_ROPE, save_model
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

ROOT = Path(__file__).parents[3]
IDS = torch.arange(3, 103)[None]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_key_value_heads": 4, "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, "tie_word_embeddings": True},
    ],
    ids=["GQA", "llama3 rope", "linear rope, tied"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_there_and_back_every_bit_is_as_it_was(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    save_model(tmp_path / "hf", dtype=dtype, **config)
    convert(tmp_path / "hf", tmp_path / "dcp")
    convert(tmp_path / "dcp", tmp_path / "back", output_format="hf", verify=True)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert before.keys() == after.keys(), "a head that is the embedding is left out"
    assert all(same_bits(before[name], after[name]) for name in before)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    assert one.dtype == other.dtype == dtype
    with torch.inference_mode():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_metas_shards_become_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    args = tiny_args(vocab_size=512)
    tiny_sentencepiece(meta_folder(tmp_path / "meta", args, random_weights(args), num_shards=4))
    convert(tmp_path / "meta", tmp_path / "hf", output_format="hf", dtype=torch.bfloat16, verify=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    assert model.config.max_position_embeddings == args.context_length
    assert (tmp_path / "hf" / "tokenizer.model").exists()
    assert not list(tmp_path.glob(".*")), "nothing half done is left"
    with pytest.raises(ValueError, match="exists; --overwrite replaces it"):
        convert(tmp_path / "meta", tmp_path / "hf", output_format="hf")
    convert(tmp_path / "meta", tmp_path / "hf", output_format="hf", overwrite=True)


def test_large_models_are_cut_into_files_with_an_index(tmp_path: Path) -> None:
    model = save_model(tmp_path / "hf")
    (tmp_path / "cut").mkdir()
    reader = open_source(tmp_path / "hf").reader
    args = reader.spec.args
    writer = HuggingFaceWriter(tmp_path / "cut", args, dtype=torch.float32, tied=False, largest_file=140_000)
    writer.reserve()
    for part in (slice(0, None, 2), slice(1, None, 2)):
        writer.fill(list(args.parameter_shapes())[part], reader.read)
    writer.write_config()
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{at}-of-00004.safetensors" for at in range(1, 5)]
    assert all(file.stat().st_size < 140_000 + 2_000 for file in files)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in model.state_dict().values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    with torch.inference_mode():
        assert torch.equal(theirs(IDS).logits, model(IDS).logits)


def test_verify_sees_a_value_that_was_written_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "hf")
    laid_out = HuggingFaceWriter._laid_out

    def wrong(self: HuggingFaceWriter, weight: str, values: torch.Tensor) -> torch.Tensor:
        return laid_out(self, weight, torch.nextafter(values, values + 1))

    monkeypatch.setattr(HuggingFaceWriter, "_laid_out", wrong)
    with pytest.raises(ValueError, match="verification failed: "):
        convert(tmp_path / "hf", tmp_path / "out", output_format="hf", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"quantize": "int8"}, "--output_format hf holds plain values: --quantize must be none, got 'int8'"),
        ({"output_model_parallel_size": 2}, "--output_model_parallel_size belongs to --output_format fairscale"),
    ],
)
def test_what_the_format_does_not_have_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    save_model(tmp_path / "hf")
    with pytest.raises(ValueError, match=re.escape(problem)):
        convert(tmp_path / "hf", tmp_path / "out", output_format="hf", **options)


@pytest.mark.integration
def test_two_processes_write_it_under_torchrun(tmp_path: Path) -> None:
    save_model(tmp_path / "hf", dtype=torch.bfloat16)
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", "--standalone"]
    options = f"--original_ckpt_dir {tmp_path}/hf --save_checkpoint_dir {tmp_path}/out --output_format hf --verify"
    done = subprocess.run(
        [*torchrun, "convert_checkpoints.py", *options.split()], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)


@pytest.mark.integration
def test_the_demos_model_is_the_same_through_gguf_safetensors_and_metas_shards(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"dtype": torch.bfloat16, "quantize": "none", "requantize": True}
    convert(gguf_file(), tmp_path / "hf", output_format="hf", **plain)
    convert(gguf_file(), tmp_path / "meta", output_format="fairscale", output_model_parallel_size=3, **plain)
    hf, meta, gguf = (open_source(path).reader for path in (tmp_path / "hf", tmp_path / "meta", gguf_file()))
    assert hf.spec.args.parameter_shapes() == meta.spec.args.parameter_shapes() == gguf.spec.args.parameter_shapes()
    assert hf.spec.dtype == meta.spec.dtype == torch.bfloat16
    for name in meta.spec.tensors():
        assert same_bits(hf.read(name), meta.read(name)), name
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.config.tie_word_embeddings
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
