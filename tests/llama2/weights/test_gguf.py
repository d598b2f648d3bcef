"""A GGUF file is read as transformers reads it, and one that is broken or of another kind is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama2 import LLM
from llama2.config import ModelArgs
from llama2.rope import ScaledRope
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.gguf.file import GgufFile
from llama2.weights.readers.gguf.rotary import recognize
from scripts.smollm2 import gguf_file
from tests.support.checkpoints import write_checkpoint
from tests.support.gguf_files import gguf_name, write_gguf
from tests.support.ranks import run_ranks
from tests.support.reference import reference_model
from tests.support.weights import meta_weights, random_weights, tiny_args


@pytest.fixture(scope="module")
def demo() -> GgufFile:
    return GgufFile(gguf_file())


@pytest.mark.integration
def test_the_architecture_of_the_demo_model(demo: GgufFile) -> None:
    assert demo.spec.args == ModelArgs(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        hidden_dim=1536,
        vocab_size=49152,
        norm_eps=1e-5,
        rope_theta=100000.0,
        context_length=8192,
    )
    assert ModelArgs.from_params(demo.spec.args.to_params()) == demo.spec.args
    assert "hidden_dim" not in demo.spec.args.to_params(), "Meta's own formula gives this width"


@pytest.mark.integration
def test_the_weights_of_the_demo_model_are_those_that_transformers_reads(demo: GgufFile) -> None:
    """Every one, to the bit. transformers permutes wq and wk to its own layout, `reference_model` ours to the same."""
    ours = reference_model(demo.spec.args, meta_weights(demo))
    theirs = load_gguf_checkpoint(gguf_file(), return_tensors=True, model_to_load=ours)["tensors"]
    for name, tensor in ours.state_dict().items():
        tied = name == "lm_head.weight"
        assert torch.equal(tensor, theirs["model.embed_tokens.weight" if tied else name]), name


@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 8, "multiple_of": 7, "rope_theta": 1e6, "norm_eps": 1e-6}])
def test_an_untied_model_comes_back_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    args = tiny_args(**changes)
    weights = random_weights(args)
    model = GgufFile(write_gguf(tmp_path / "model.gguf", args, weights))
    assert ModelArgs.from_params(model.spec.args.to_params()).parameter_shapes() == args.parameter_shapes()
    assert (model.spec.args.rope_theta, model.spec.args.norm_eps) == (args.rope_theta, args.norm_eps)
    for name, weight in meta_weights(model).items():
        assert torch.equal(weight, weights[name]), name


def test_a_file_is_converted_as_metas_folder_is(tmp_path: Path) -> None:
    """Alone, since it brings the tokenizer along."""
    args = tiny_args()
    weights = random_weights(args)
    convert(write_gguf(tmp_path / "model.gguf", args, weights), tmp_path / "dcp", dtype=torch.bfloat16, verify=True)
    for name, weight in meta_weights(DcpFolder(tmp_path / "dcp")).items():
        assert torch.equal(weight, weights[name].bfloat16()), name
    assert load_tokenizer(tmp_path / "dcp").vocab_size == args.vocab_size


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "qwen2"}, "architecture must be 'llama', got 'qwen2'"),
        ({"metadata": {"expert_count": 8}}, "llama.expert_count is 8, and such models are not supported"),
        ({"metadata": {"rope.scaling.type": "yarn"}}, "rotary scaling 'yarn' is not supported"),
        ({"metadata": {"attention.sliding_window": 512, "context_length": 4096}}, "attention.sliding_window is 512"),
        ({"metadata": {"rope.dimension_count": 4}}, "llama.rope.dimension_count must be the size of a head, 8, got 4"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path: Path, options: dict[str, Any], problem: str) -> None:
    args = tiny_args(n_layers=1)
    path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), **options)
    with pytest.raises(ValueError, match=re.escape(problem)):
        GgufFile(path)


def test_tensors_that_disagree_with_the_metadata_are_refused(tmp_path: Path) -> None:
    args = tiny_args(n_layers=1)
    weights = random_weights(args)
    attention = "layers.0.attention.wq.weight"
    shape = "tensor 'blk.0.attn_q.weight' has the shape"
    cases = {
        "tensor 'blk.0.attn_q.weight' is missing": {k: v for k, v in weights.items() if k != attention},
        "tensor 'blk.0.attn_q.bias' is not part of a Llama model": weights | {"blk.0.attn_q.bias": torch.ones(64)},
        f"{shape} (63, 64), and by the metadata it is (64, 64)": weights | {attention: weights[attention][:63]},
        f"{shape} (32, 128)": weights | {attention: weights[attention].reshape(32, 128)},
        "tensor 'token_embd.weight' is missing": {k: v for k, v in weights.items() if "embed" not in k},
    }
    for number, (problem, changed) in enumerate(cases.items()):
        path = write_gguf(tmp_path / f"{number}.gguf", args, changed)
        with pytest.raises(ValueError, match=re.escape(problem)):
            GgufFile(path)


def test_scaled_positions(tmp_path: Path) -> None:
    args = tiny_args(n_layers=1)
    for metadata, factor in (
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "none"}, 1.0),
        ({"rope.scale_linear": 2.5}, 2.5),
    ):
        path = write_gguf(tmp_path / "model.gguf", args, random_weights(args), metadata=metadata)
        assert GgufFile(path).spec.args.rope_scaling == factor


@pytest.mark.parametrize("rope_theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "scaled",
    [ScaledRope(), ScaledRope(factor=32.0), ScaledRope(factor=16.0, high_freq_factor=8.0, original_context_length=512)],
)
def test_the_divisors_of_llama_3_1_are_recognized(scaled: ScaledRope, head_dim: int, rope_theta: float) -> None:
    half = head_dim // 2
    divisors = np.array([scaled.divisor(rope_theta ** -(each / half)) for each in range(half)], np.float32)
    assert recognize(divisors, rope_theta) == scaled
    divisors[half // 2] *= 1.01
    with pytest.raises(ValueError, match=r"rope_freqs\.weight divides the rotary frequencies otherwise"):
        recognize(divisors, rope_theta)


def test_a_file_of_llama_3_1(tmp_path: Path) -> None:
    args = tiny_args(n_layers=1, rope_theta=500000.0)
    divisors = torch.tensor([ScaledRope().divisor(500000.0 ** -(each / 4)) for each in range(4)])
    for values, expected in ((divisors, ScaledRope()), (torch.ones(4), None)):
        path = write_gguf(tmp_path / "model.gguf", args, random_weights(args) | {"rope_freqs.weight": values})
        assert GgufFile(path).spec.args.scaled_rope == expected
    for values, problem in (
        (torch.ones(3), "must have 4 values in F32, got the shape (3,) in F32"),
        (torch.tensor([1.0, 1.0, 0.0, 8.0]), "must have numbers from 1 up"),
        (torch.tensor([1.0, 2.0, 1.0, 8.0]), "divides the rotary frequencies otherwise than Llama 3.1 does"),
    ):
        path = write_gguf(tmp_path / "model.gguf", args, random_weights(args) | {"rope_freqs.weight": values})
        with pytest.raises(ValueError, match=re.escape(problem)):
            GgufFile(path)


def test_a_model_in_parts_is_read_whole(tmp_path: Path) -> None:
    args = tiny_args()
    weights = random_weights(args)
    first = write_gguf(tmp_path / "model.gguf", args, weights, parts=3)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == [f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for part in parts:
        for name, weight in meta_weights(GgufFile(part)).items():
            assert torch.equal(weight, weights[name]), name
    for name, problem in (
        ("model.gguf", "model.gguf is one of 3 parts: its name must say so"),
        ("model-00004-of-00003.gguf", "is none of 3 parts"),
    ):
        (tmp_path / name).write_bytes(first.read_bytes())
        with pytest.raises(ValueError, match=problem):
            GgufFile(tmp_path / name)
    whole = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(
        ValueError, match=r"00002-of-00003\.gguf says that it is part 3 of 3: it has another one's name"
    ):
        GgufFile(first)
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf is missing: the model is in 3 parts"):
        GgufFile(parts[2])
    parts[1].write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.gguf is not a whole GGUF file"):
        GgufFile(first)


def convert_demo(folder: str) -> None:
    convert(gguf_file(), folder, verify=True)


@pytest.mark.integration
def test_the_demo_model_stays_as_it_is_stored(demo: GgufFile, tmp_path: Path) -> None:
    """Converted by two processes it has the values of its file, and gives their logits."""
    run_ranks(2, convert_demo, str(tmp_path / "stored"))
    values = meta_weights(DcpFolder(tmp_path / "stored"))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(gguf_file()).tensors}
    for name, weight in values.items():
        tensor = stored[gguf_name(name)] if gguf_name(name) in stored else stored["token_embd.weight"]
        expected = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
        assert torch.equal(weight, expected.view_as(weight).to(weight.dtype)), name
    demo.write_tokenizer(tmp_path)
    files = (tmp_path / name for name in ("tokenizer.json", "tokenizer_config.json"))
    plain = write_checkpoint(tmp_path / "plain", demo.spec.args, {k: v.float() for k, v in values.items()}, *files)
    ids = LLM(plain).tokenizer.encode_prompt("The capital of France is Paris. " * 4)
    logits = [LLM(each, dtype=torch.float32, max_seq_len=128).score(ids) for each in (tmp_path / "stored", plain)]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
