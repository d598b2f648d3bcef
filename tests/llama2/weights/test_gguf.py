"""A GGUF file is read as transformers reads it, and one that is broken or of another kind is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from llama2.config import ModelArgs
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.gguf import GgufFile
from scripts.smollm2 import gguf_file
from tests.support.gguf_files import write_gguf
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


@pytest.mark.integration
def test_the_tokenizer_of_the_demo_model_is_the_one_that_transformers_builds(demo: GgufFile, tmp_path: Path) -> None:
    demo.write_tokenizer(tmp_path)
    ours = load_tokenizer(tmp_path)
    architecture, description, names = get_gguf_tokenizer(str(gguf_file()))
    theirs, _ = convert_gguf_tokenizer(architecture, description)
    for text in (
        "Hello, world!",
        "  two  spaces\n\nnew\tlines",
        "今日は 🙂",
        "don't You'll",
        "def f(x):\n    return x\n",
    ):
        assert ours.encode(text) == theirs.encode(text).ids
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert ours.template_variables[name] == names[name]
    assert ours.chat_template == names["chat_template"]


def test_smollm_words_are_cut_before_and_after_every_digit(demo: GgufFile, tmp_path: Path) -> None:
    """As SmolLM2's own tokenizer.json does, and llama.cpp; transformers' GGUF reader forgets it."""
    demo.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    pieces = [tokenizer.token_bytes(token_id) for token_id in tokenizer.encode("in 1969 or   7")]
    assert pieces == [b"in", b" ", b"1", b"9", b"6", b"9", b" or", b"   ", b"7"]


def test_transformers_reads_the_tokenizer_that_is_written(demo: GgufFile, tmp_path: Path) -> None:
    demo.write_tokenizer(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert theirs.encode("The year is 2026.") == ours.encode_prompt("The year is 2026.")
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


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


def test_a_file_that_asks_for_bos_gets_it(tmp_path: Path) -> None:
    args = tiny_args()
    GgufFile(write_gguf(tmp_path / "model.gguf", args, random_weights(args))).write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_prompt("abc") == [0, 95, tokenizer.encode("c")[0]]
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.chat_template) == (96, {1}, None)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    args = tiny_args(n_layers=1)
    whole = write_gguf(tmp_path / "model.gguf", args, random_weights(args)).read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 23, *range(24, len(whole) - 1, 997), len(whole) - 100]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is not a whole GGUF file: [^\n]*$"):
            GgufFile(path)


@pytest.mark.parametrize(
    "content", [b"no GGUF at all" * 100, b"GGUF" + b"\xff" * 1000, b"GGUF\x03\0\0\0" + b"\xff" * 99]
)
def test_junk_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "junk.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"junk\.gguf is not a whole GGUF file"):
        GgufFile(tmp_path / "junk.gguf")
    with pytest.raises(ValueError, match=r"nothing\.gguf is not a whole GGUF file: .*No such file"):
        GgufFile(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"architecture": "qwen2"}, "architecture must be 'llama', got 'qwen2'"),
        ({"experts": 8}, "a mixture of 8 experts is not supported"),
        ({"rope_scaling": gguf.RopeScalingType.YARN}, "rotary scaling 'yarn' is not supported"),
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
    cases = {
        "tensor 'blk.0.attn_q.weight' is missing": {k: v for k, v in weights.items() if k != attention},
        "tensor 'rope_freqs.weight' is not part of a Llama model": weights | {"rope_freqs.weight": torch.ones(4)},
        "tensor 'blk.0.attn_q.weight' has 4032 elements, the metadata says 4096": weights
        | {attention: weights[attention][:63]},
    }
    for number, (problem, changed) in enumerate(cases.items()):
        path = write_gguf(tmp_path / f"{number}.gguf", args, changed)
        with pytest.raises(ValueError, match=re.escape(problem)):
            GgufFile(path)


@pytest.mark.parametrize(("tokenizer", "words"), [("llama", "default"), ("gpt2", "llama-bpe")])
def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path: Path, tokenizer: str, words: str) -> None:
    args = tiny_args(n_layers=1)
    model = GgufFile(write_gguf(tmp_path / "model.gguf", args, random_weights(args), tokenizer=tokenizer, words=words))
    with pytest.raises(ValueError, match=f"not read yet: its tokenizer is '{tokenizer}' with words cut as '{words}'"):
        model.write_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    """A merge of a piece that is not in the vocabulary."""
    args = tiny_args(n_layers=1)
    whole = write_gguf(tmp_path / "model.gguf", args, random_weights(args)).read_bytes()
    assert whole.count(b"a b") == 1
    (tmp_path / "model.gguf").write_bytes(whole.replace(b"a b", b"a \x01"))
    with pytest.raises(ValueError, match=r"model\.gguf: the tokenizer in the metadata is damaged: .*vocabulary"):
        GgufFile(tmp_path / "model.gguf").write_tokenizer(tmp_path)


def test_a_written_config_is_plain_json(demo: GgufFile, tmp_path: Path) -> None:
    demo.write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False
    assert config["eos_token"] == "<|im_end|>"
