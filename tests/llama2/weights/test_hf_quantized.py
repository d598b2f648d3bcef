"""A quantized Hugging Face folder is the model of the values that its codes stand for, in formats that hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from llama2 import LLM
from llama2.weights.convert import convert
from llama2.weights.formats import Format
from llama2.weights.formats.lut4 import Lut4
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8
from llama2.weights.precision import Converted, target
from llama2.weights.readers.hugging_face import HuggingFaceFolder, open_hugging_face
from tests.support.hugging_face import edit_json
from tests.support.quantized import pack_bits, save_awq, save_bitsandbytes, save_gptq
from tests.support.ranks import run_ranks

IDS = torch.arange(3, 203).tolist()
Save = Callable[..., PreTrainedModel]


def assert_values(reader: HuggingFaceFolder, model: PreTrainedModel, folder: Path) -> None:
    """Every weight has the values of the model, to the bit."""
    model.save_pretrained(folder)
    plain = open_hugging_face(folder)
    values = Converted(reader, target(reader.spec, dtype=torch.float32, quantize="none", requantize=True))
    for name in plain.spec.tensors():
        assert torch.equal(values.read(name), plain.read(name)), name


def formats(reader: HuggingFaceFolder) -> dict[str, Format]:
    """Those of the first layer."""
    return {name.removeprefix("layers.0."): each for name, each in reader.spec.formats.items() if ".0." in name}


# A head has 16 features, the hidden axis 96: groups of 64 end within both.
CASES: dict[str, tuple[Save, dict[str, Any], Format]] = {
    "GPTQ, 4 bits": (save_gptq, {}, Q4(group=32)),
    "GPTQ, symmetric": (save_gptq, {"sym": True}, Q4(group=32, zero=8)),
    "GPTQ, first version": (save_gptq, {"version": "gptq"}, Q4(group=32)),
    "GPTQ, before versions": (save_gptq, {"version": None, "sym": True}, Q4(group=32, zero=8)),
    "GPTQ, groups that end within rows": (save_gptq, {"group_size": 64}, Q4(group=64)),
    "GPTQ, one group": (save_gptq, {"group_size": -1}, Q4(group=None)),
    "GPTQ, 2 bits": (save_gptq, {"bits": 2, "version": "gptq"}, Q4(group=32)),
    "GPTQ, 2 bits, symmetric": (save_gptq, {"bits": 2, "sym": True}, Q4(group=32, zero=2)),
    "GPTQ, 3 bits": (save_gptq, {"bits": 3}, Q4(group=32)),
    "GPTQ, 3 bits, first version": (save_gptq, {"bits": 3, "sym": True, "version": "gptq"}, Q4(group=32, zero=4)),
    "GPTQ, 8 bits": (save_gptq, {"bits": 8, "sym": True, "version": "gptq"}, Q8(group=32)),
    "GPTQ, 8 bits, one group": (save_gptq, {"bits": 8, "sym": True, "group_size": -1}, Q8(group=None)),
    "GPTQ, bf16 scales": (save_gptq, {"scales": torch.bfloat16}, Q4(group=32)),
    "AWQ": (save_awq, {}, Q4(group=32)),
    "AWQ, groups that end within rows": (save_awq, {"group_size": 64}, Q4(group=64)),
    "AWQ, one group": (save_awq, {"group_size": -1}, Q4(group=None)),
    "NF4": (save_bitsandbytes, {"nested": False}, Lut4(table="nf4", group=64)),
    "NF4, double quantization": (save_bitsandbytes, {}, Lut4(table="nf4", group=64)),
    "NF4, blocks of 128": (save_bitsandbytes, {"block_size": 128}, Lut4(table="nf4", group=64)),
    "FP4": (save_bitsandbytes, {"table": "fp4"}, Lut4(table="fp4", group=64)),
}


@pytest.mark.parametrize(("save", "options", "expected"), CASES.values(), ids=CASES)
def test_values_and_formats(tmp_path: Path, save: Save, options: dict[str, Any], expected: Format) -> None:
    model = save(tmp_path / "hf", **options)
    reader = open_hugging_face(tmp_path / "hf")
    assert_values(reader, model, tmp_path / "plain")
    found = formats(reader)
    assert len(found) == 7
    assert found["attention.wq"] == expected
    assert {type(each) for each in found.values()} == {type(expected)}
    assert not reader.notes


def test_logits_are_those_of_the_dequantized_model(quantized: tuple[Path, torch.Tensor]) -> None:
    folder, theirs = quantized
    torch.testing.assert_close(logits(str(folder)), theirs, rtol=0, atol=1e-4)


@pytest.mark.integration
def test_they_are_the_same_on_two_ranks(quantized: tuple[Path, torch.Tensor]) -> None:
    folder, theirs = quantized
    torch.testing.assert_close(run_ranks(2, logits, str(folder))[0], theirs, rtol=0, atol=1e-4)


def logits(folder: str) -> torch.Tensor:
    with LLM(folder, max_seq_len=256, dtype="float32") as llm:
        return llm.score(IDS)


@pytest.fixture(
    scope="module",
    params=[
        (save_gptq, {"group_size": 64}),
        (save_gptq, {"sym": True, "version": "gptq", "shuffled": ("down_proj",)}),
        (save_gptq, {"shuffled": ("_proj",)}),
        (save_gptq, {"bits": 8, "sym": True}),
        (save_awq, {}),
        (save_bitsandbytes, {}),
    ],
    ids=["GPTQ", "GPTQ, w2 out of order", "GPTQ, all out of order", "GPTQ, 8 bits", "AWQ", "NF4"],
)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A converted folder, and transformers' logits."""
    folder = tmp_path_factory.mktemp("quantized")
    save, options = request.param
    model = save(folder / "hf", **options)
    convert(folder / "hf", folder / "out", verify=True)
    with torch.inference_mode():
        return folder / "out", model(torch.tensor([IDS])).logits[0]


def test_groups_out_of_order(tmp_path: Path) -> None:
    """w2 stays in 4 bits, since the layers before it can give its inputs in any order; the others become plain."""
    model = save_gptq(tmp_path / "hf", shuffled=("_proj",))
    reader = open_hugging_face(tmp_path / "hf")
    assert formats(reader) == {"feed_forward.w2": Q4(group=32)}
    assert [note.split(",")[0] for note in reader.notes] == ["12 weights in GPTQ with desc_act become float32"]
    plain = Converted(reader, target(reader.spec, quantize="none"))
    weights = dict(model.named_parameters())
    down = weights["model.layers.0.mlp.down_proj.weight"].data
    order = load_file(tmp_path / "hf" / "model.safetensors")["model.layers.0.mlp.down_proj.g_idx"].argsort(stable=True)
    assert torch.equal(plain.read("layers.0.feed_forward.w2.weight"), down[:, order])
    for name, stored in (("w1", "gate_proj"), ("w3", "up_proj")):
        rows = weights[f"model.layers.0.mlp.{stored}.weight"].data[order]
        assert torch.equal(plain.read(f"layers.0.feed_forward.{name}.weight"), rows)


def test_groups_out_of_order_are_kept_where_only_w2_has_them(tmp_path: Path) -> None:
    save_gptq(tmp_path / "hf", shuffled=("down_proj",))
    assert len(formats(open_hugging_face(tmp_path / "hf"))) == 7


def test_heads_that_no_group_fits_make_wo_plain(tmp_path: Path) -> None:
    """Neither go groups of 32 or 16 into heads of 40 features, nor these into those."""
    model = save_gptq(tmp_path / "hf", head_dim=40)
    reader = open_hugging_face(tmp_path / "hf")
    assert len(formats(reader)) == 6
    assert "attention.wo" not in formats(reader)
    assert [note.split(",")[0] for note in reader.notes] == ["2 weights in GPTQ become float32"]
    assert_values(reader, model, tmp_path / "plain")


def test_some_weights_stay_plain(tmp_path: Path) -> None:
    model = save_gptq(tmp_path / "hf", plain=("q_proj", "down_proj"))
    reader = open_hugging_face(tmp_path / "hf")
    assert len(formats(reader)) == 5
    assert_values(reader, model, tmp_path / "plain")


def test_bf16_scales_that_fp16_cannot_hold(tmp_path: Path) -> None:
    model = save_gptq(tmp_path / "hf", scales=torch.bfloat16)
    path = tmp_path / "hf" / "model.safetensors"
    state, name = load_file(path), "model.layers.0.self_attn.q_proj"
    state[f"{name}.scales"] *= 2.0**-20
    save_file(state, path)
    model.get_parameter(f"{name}.weight").data *= 2.0**-20
    reader = open_hugging_face(tmp_path / "hf")
    assert formats(reader)["attention.wq"] == Q4(group=32, scales=torch.float32)
    assert formats(reader)["attention.wk"] == Q4(group=32)
    assert_values(reader, model, tmp_path / "plain")


def test_a_zero_of_0_borrows_in_the_first_version(tmp_path: Path) -> None:
    """As GPTQModel writes it: a one less in each field of the word as a whole."""
    model = save_gptq(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    for name in state:
        if name.endswith("qzeros"):
            state[name] -= pack_bits(torch.ones(1, 8), 4)
    save_file(state, path)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    edit_json(tmp_path / "hf" / "config.json", quantization_config=config)
    assert_values(open_hugging_face(tmp_path / "hf"), model, tmp_path / "plain")


def test_biases_of_zeros_that_autogptq_wrote_are_left_out(tmp_path: Path) -> None:
    model = save_gptq(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = load_file(path)
    for name in [name for name in state if name.endswith("scales")]:
        state[name.replace("scales", "bias")] = torch.zeros(state[name].shape[1]).half()
    save_file(state, path)
    assert_values(open_hugging_face(tmp_path / "hf"), model, tmp_path / "plain")
