"""`--quantize gptq` with the library itself, which `make gptq` installs. Run by `make test-gptq`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from llama2.text.tokenizer import load_tokenizer
from llama2.weights.calibration import CALIBRATION_FILE
from llama2.weights.certificate import Identity
from llama2.weights.convert import convert
from llama2.weights.formats.q4 import Q4
from llama2.weights.formats.q8 import Q8
from llama2.weights.readers.dcp import DcpFolder
from tests.support.adapters import write_random_adapter
from tests.support.conversion import ROOT, flags
from tests.support.hugging_face import save_model
from tests.support.tokenizers import SENTENCES

pytestmark = pytest.mark.slow

TEXT = "\n".join(SENTENCES * 8)
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}


def model_of(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def test_calibrated_weights_are_better_on_their_text_than_the_nearest(tmp_path, command, monkeypatch):
    """And all the folder holds is what it should, from the real library, for a model that needs groups of 64."""
    monkeypatch.chdir(ROOT)
    save_model(tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    options = [*flags(tmp_path / "source", tmp_path / "out"), "--quantize", "gptq", "--verify"]
    code, lines = command(*options, "--calibration", tmp_path / "text.txt")
    assert code == 0, lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "text.txt"]

    spec = DcpFolder(tmp_path / "out").spec
    heads = {"tok_embeddings", "output"}
    assert spec.formats.keys() == {name for name, axes in spec.args.weight_axes().items() if axes.inputs}
    assert {type(format) for name, format in spec.formats.items() if name in heads} == {Q8}
    layers = {format for name, format in spec.formats.items() if name not in heads}
    assert layers == {Q4(group=64, zero=8)}
    about = json.loads((tmp_path / "out" / CALIBRATION_FILE).read_text())
    assert about["library"] == "gptqmodel 7.6.0"
    assert about["sha256"] == hashlib.sha256(TEXT.encode()).hexdigest()
    assert CALIBRATION_FILE in json.loads((tmp_path / "out" / "manifest.json").read_text())["files"]

    convert(tmp_path / "out", tmp_path / "calibrated", output_format="hf", dtype=torch.float32)
    exact, calibrated, nearest = (model_of(tmp_path / name) for name in ("source", "calibrated", "source"))
    for layer in nearest.model.layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if isinstance(module, torch.nn.Linear):
                module.weight.data = rounded(module.weight.data)
    ids = load_tokenizer(tmp_path / "out").encode_prompt(TEXT)[:256]
    logits, *others = (model(torch.tensor([ids])).logits.detach() for model in (exact, calibrated, nearest))
    near, far = ((other - logits).square().mean().sqrt() for other in others)
    assert near < 0.9 * far


def test_an_adapter_is_merged_before_the_text_is_seen(tmp_path, command, monkeypatch):
    """The same bits as of the merged model; and without the adapter they are others."""
    monkeypatch.chdir(ROOT)
    save_model(tmp_path / "source", dtype=torch.bfloat16, **SIZES)
    (tmp_path / "text.txt").write_text(TEXT)
    convert(tmp_path / "source", tmp_path / "plain")
    write_random_adapter(tmp_path / "adapter", DcpFolder(tmp_path / "plain").spec.args)
    convert(tmp_path / "source", tmp_path / "merged", adapter=tmp_path / "adapter")
    folders = []
    for source, adapter in (("source", ["--adapter", tmp_path / "adapter"]), ("merged", []), ("plain", [])):
        folders.append(tmp_path / f"calibrated-{source}")
        options = [*flags(tmp_path / source, folders[-1]), *adapter, "--quantize", "gptq"]
        code, lines = command(*options, "--calibration", tmp_path / "text.txt")
        assert code == 0, lines
    at_once, after, without = (Identity.of(folder).weights for folder in folders)
    assert at_once == after
    assert at_once != without


def rounded(values_FC: torch.Tensor) -> torch.Tensor:
    """To the nearest, in the format that the library is asked for."""
    groups_FGI = values_FC.unflatten(1, (-1, 64))
    scales_FG1 = 2 * groups_FGI.abs().amax(-1, keepdim=True) / 15
    return ((groups_FGI / scales_FG1).round().clamp(-8, 7) * scales_FG1).flatten(1)
