"""On a trained model, too: a mixed batch equals PEFT's, and what is merged equals what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama2.adapters.format import read_adapter
from llama2.config import ModelArgs
from llama2.weights.convert import convert
from llama2.weights.readers.dcp import DcpFolder
from tests.support.adapters import adapted_logits
from tests.support.peft_models import peft_logits, peft_model
from tests.support.weights import meta_weights

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*single process.*"),
]

# "The museum opens at nine, and the last visitors leave at five in the afternoon." Without special tokens: their logits
# are so large that fp32 itself differs by 1e-4.
IDS = [504, 6508, 10573, 418, 7462, 28, 284, 260, 1596, 7803, 3934, 418, 2531, 281, 260, 11342, 30]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS: dict[str, list[str]] = {"all": list(MODULES)} | {module: [module] for module in MODULES}


def test_each_module_alone_all_together_none_and_merged(smollm2_checkpoint: Path, tmp_path: Path) -> None:
    args = ModelArgs.load(smollm2_checkpoint)
    weights = {name: values.float() for name, values in meta_weights(DcpFolder(smollm2_checkpoint)).items()}
    expected = []
    for name, modules in TARGETS.items():
        model = peft_model(args, weights, target_modules=modules, r=8, lora_alpha=0.25)
        model.save_pretrained(str(tmp_path / name))
        expected.append(peft_logits(model, IDS))
    with model.disable_adapter():
        expected.append(peft_logits(model, IDS))
    adapters = [read_adapter(tmp_path / name, args) for name in TARGETS]
    ours = adapted_logits(smollm2_checkpoint, [(IDS, adapter) for adapter in (*adapters, None)])
    assert ours is not None
    for name, row, logits in zip((*TARGETS, "none"), ours.split(len(IDS)), expected, strict=True):
        torch.testing.assert_close(row, logits, atol=1e-4, rtol=0, msg=name)
        assert name == "none" or (logits - expected[-1]).abs().max() > 0.01, name

    convert(smollm2_checkpoint, tmp_path / "merged", adapter=tmp_path / "all", dtype=torch.float32)
    merged = adapted_logits(tmp_path / "merged", [(IDS, None)])
    torch.testing.assert_close(merged, ours[: len(IDS)], atol=1e-4, rtol=0)
