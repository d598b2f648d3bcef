"""Adapters that PEFT writes compute here what they compute there, and ours there what they compute here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from llama2.adapters.adapter import Adapter
from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import Base, read_adapter, write_adapter
from tests.llama2.adapters.conftest import ARGS, WEIGHTS
from tests.support.adapters import adapted_logits
from tests.support.peft_models import peft_logits, peft_model
from tests.support.reference import reference_model

# transformers says it of PEFT's own use of it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")

IDS = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(3)).tolist()
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

OPTIONS: dict[str, dict[str, Any]] = {
    **{module: {"target_modules": [module]} for module in MODULES},
    "all of them": {"target_modules": list(MODULES)},
    "all-linear": {"target_modules": "all-linear"},
    "All-Linear but the queries": {"target_modules": "All-Linear", "exclude_modules": ["q_proj"]},
    "PEFT's own choice": {"target_modules": None},
    "rsLoRA": {"target_modules": list(MODULES), "use_rslora": True},
    "a fraction as alpha": {"target_modules": "all-linear", "lora_alpha": 2.5},
    "ranks and alphas by module": {
        "target_modules": list(MODULES),
        "rank_pattern": {r"layers\.1\..*_proj": 6, "q_proj": 2},  # PEFT sorts them when it saves
        "alpha_pattern": {r"layers\.0\.mlp\.(up|down)_proj": 3, "v_proj": 32},
    },
    "ranks by module, rsLoRA": {
        "target_modules": list(MODULES),
        "rank_pattern": {"down_proj": 16, "mlp.up_proj": 2, "model.layers.0.self_attn.o_proj": 1},
        "use_rslora": True,
    },
    "a regular expression": {"target_modules": r".*\.[01]\.self_attn\.(q|k)_proj"},
    "excluded by a regular expression": {"target_modules": list(MODULES), "exclude_modules": r".*layers\.0\..*"},
    "a layer": {"target_modules": list(MODULES), "layers_to_transform": 1},
    "layers": {"target_modules": ["k_proj", "mlp.up_proj"], "layers_to_transform": [0, 7], "layers_pattern": "layers"},
    "full names beside a layer": {
        "target_modules": ["model.layers.1.mlp.gate_proj", "q_proj"],
        "layers_to_transform": [0],
    },
    "some that the model has not": {"target_modules": ["q_proj", "gate", "experts.w1"]},
    "drawn without a zero": {"target_modules": "all-linear", "init_lora_weights": False},
}


def ours(checkpoint: Path, adapter: Adapter) -> torch.Tensor:
    logits = adapted_logits(checkpoint, [(IDS, adapter)])
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def base_logits() -> torch.Tensor:
    return peft_logits(reference_model(ARGS, WEIGHTS), IDS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_logits_equal_pefts_both_ways(
    checkpoint: Path, base_logits: torch.Tensor, tmp_path: Path, options: dict[str, Any]
) -> None:
    model = peft_model(ARGS, WEIGHTS, **options)
    model.save_pretrained(str(tmp_path / "peft"))
    expected = peft_logits(model, IDS)
    adapter = read_adapter(tmp_path / "peft", ARGS)
    torch.testing.assert_close(ours(checkpoint, adapter), expected, atol=1e-4, rtol=0)
    assert (expected - base_logits).abs().max() > 1e-2

    config = AdapterConfig.load(tmp_path / "peft")
    write_adapter(
        tmp_path / "ours", adapter.pairs, config, ARGS, base=Base(weights="xxh3_128:00", stored={"float32": 1})
    )
    assert AdapterConfig.load(tmp_path / "ours") == config
    assert read_adapter(tmp_path / "ours", ARGS).identity == adapter.identity
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")
        theirs = PeftModel.from_pretrained(reference_model(ARGS, WEIGHTS), str(tmp_path / "ours")).eval()
    assert torch.equal(peft_logits(theirs, IDS), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_of_16_bits_stay_as_they_are(tmp_path: Path, checkpoint: Path, dtype: torch.dtype) -> None:
    model = peft_model(ARGS, WEIGHTS, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    model.save_pretrained(str(tmp_path / "peft"))
    adapter = read_adapter(tmp_path / "peft", ARGS)
    assert {pair.a_RC.dtype for pair in adapter.pairs.values()} == {dtype}
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    torch.testing.assert_close(ours(checkpoint, adapter), peft_logits(model, IDS), atol=1e-4, rtol=0)


def test_sixteen_adapters_and_the_base_in_a_batch_equal_pefts_adapter_names(tmp_path: Path, checkpoint: Path) -> None:
    names = [f"adapter-{seed}" for seed in range(16)]
    for seed, name in enumerate(names):
        # Any modules, of any ranks.
        modules = [module for place, module in enumerate(MODULES) if seed % 3 == 0 or (seed + place) % 3]
        rank = 1 + seed % 8
        peft_model(ARGS, WEIGHTS, seed=seed, target_modules=modules, r=rank, lora_alpha=2 * rank).save_pretrained(
            str(tmp_path / name)
        )
    model = PeftModel.from_pretrained(reference_model(ARGS, WEIGHTS), str(tmp_path / names[0]), names[0]).eval()
    for name in names[1:]:
        model.load_adapter(str(tmp_path / name), name)
    order = [*names[5:], "__base__", *names[:5]]
    prompts = [IDS[start : start + 12] for start in range(17)]
    with torch.no_grad():
        expected = model(torch.tensor(prompts), adapter_names=order).logits.flatten(0, 1)
    adapters = [None if name == "__base__" else read_adapter(tmp_path / name, ARGS) for name in order]
    together = adapted_logits(checkpoint, list(zip(prompts, adapters, strict=True)))
    assert together is not None
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)


def test_the_identity_follows_what_is_computed(
    peft_folder: Path, tmp_path: Path, make_adapter: Callable[..., Adapter]
) -> None:
    adapter, config = read_adapter(peft_folder, ARGS), AdapterConfig.load(peft_folder)
    written = json.loads((peft_folder / "adapter_config.json").read_text())
    for number, (key, value, same) in enumerate(
        [("lora_dropout", 0.5, True), ("base_model_name_or_path", "other", True), ("lora_alpha", 9, False)]
    ):
        folder = tmp_path / str(number)
        write_adapter(folder, adapter.pairs, config, ARGS)
        (folder / "adapter_config.json").write_text(json.dumps(written | {key: value}))
        assert (read_adapter(folder, ARGS).identity == adapter.identity) == same, key
    a, b = (make_adapter(seed=seed) for seed in (7, 8))
    assert a.identity != b.identity
