"""What is no adapter of this model, or none that can be computed as it was trained, is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from llama2.adapters.config import AdapterConfig
from llama2.adapters.format import Base, check_fits, read_adapter, read_base, write_adapter
from llama2.adapters.reference import AdapterRef
from llama2.errors import InvalidValue
from tests.llama2.adapters.conftest import ARGS, WEIGHTS
from tests.support.peft_models import peft_model
from tests.support.reference import reference_model
from tests.support.weights import tiny_args

pytestmark = [
    # transformers says it of PEFT's own use of it, and PEFT of what is refused here.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LATER = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def folder(peft_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return shutil.copytree(peft_folder, tmp_path / "adapter")


def edit(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type must be LORA"),
    ({"use_dora": True}, "DoRA, which scales the sums anew, is not supported: train with use_dora=false"),
    ({"bias": "all"}, "trained biases are not supported: train with bias=none"),
    ({"lora_bias": True}, "train with lora_bias=false"),
    ({"modules_to_save": ["lm_head"]}, "modules that are trained whole are not supported"),
    ({"trainable_token_indices": [1, 2]}, "trained embeddings are not supported"),
    ({"layer_replication": [[0, 2]]}, "repeated layers are not supported"),
    ({"target_parameters": ["w"]}, "only modules are changed"),
    ({"alora_invocation_tokens": [5]}, "an adapter is added to all tokens"),
    ({"use_qalora": True}, "QA-LoRA"),
    ({"use_bdlora": {"nblocks": 2}}, "block-diagonal"),
    ({"megatron_config": {"x": 1}}, "Megatron"),
    ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights: save the adapter with PEFT's path_initial"),
    ({"init_lora_weights": "olora"}, "changes the base's weights"),
    ({"init_lora_weights": "loftq"}, "changes the base's weights"),
    ({"init_lora_weights": "corda"}, "changes the base's weights"),
    ({"init_lora_weights": "lora_ga"}, "changes the base's weights"),
    ({"init_lora_weights": "new"}, "init_lora_weights='new' is not supported, only true, false, gaussian"),
    ({"init_lora_weights": 3}, "init_lora_weights=3 is not supported"),
    ({"kasa_config": {"beta": 1}}, "kasa_config={'beta': 1} is unknown, and may change what is computed"),
    ({"use_magic": True}, "use_magic=True is unknown"),
    ({"target_modules": ["c_attn"]}, "no module of the model is matched by target_modules=('c_attn',)"),
    ({"target_modules": []}, "no module of the model is matched"),
    ({"exclude_modules": ".*"}, "no module of the model is matched"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [2]}, "no module of the model is matched"),
    ({"target_modules": ["q_proj", "lm_head"]}, "target_modules match lm_head"),
    ({"target_modules": ".*(embed_tokens|q_proj)"}, "target_modules match model.embed_tokens"),
    ({"target_modules": "("}, "'(' is no regular expression"),
    ({"rank_pattern": {"[": 1}}, "'[' is no regular expression"),
    ({"target_modules": 3}, "target_modules must be a string or a list of strings, got 3"),
    ({"target_modules": ["q_proj", 3]}, "target_modules must be a string or a list of strings"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "need a list as target_modules"),
    ({"layers_to_transform": ["1"]}, "layers_to_transform must be an integer or a list of integers"),
    ({"r": 0}, "r must be an integer from 1 to 65536, got 0"),
    ({"r": True}, "r must be an integer from 1 to 65536, got True"),
    ({"r": "8"}, "r must be an integer from 1 to 65536, got '8'"),
    ({"rank_pattern": {"q_proj": -1}}, "rank_pattern['q_proj'] must be an integer from 1"),
    ({"rank_pattern": [1]}, "rank_pattern must be an object"),
    ({"lora_alpha": float("nan")}, "lora_alpha must be a number of at most 1e+09, got nan"),
    ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern['q_proj'] must be a number of at most 1e+09, got '8'"),
    ({"lora_alpha": 10**400}, "lora_alpha must be a number of at most 1e+09, got 1000"),
    ({"r": 10**400}, "r must be an integer from 1 to 65536, got 1000"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ({"lora_dropout": 2}, "lora_dropout must be in [0, 1]"),
    ({"base_model_name_or_path": 7}, "base_model_name_or_path must be a string"),
    ({"r": 3}, "lora_A.weight has shape (4, 64), expected (3, 64) by adapter_config.json and the model"),
    ({"target_modules": ["q_proj"]}, "is of a module that the model has not, or that adapter_config.json does not"),
]


@pytest.mark.parametrize(("values", "message"), KEYS, ids=[str(values) for values, _ in KEYS])
def test_a_config_is_refused_for_what_it_says(folder: Path, values: dict[str, Any], message: str) -> None:
    edit(folder, **values)
    with pytest.raises(ValueError) as error:
        read_adapter(folder, ARGS)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"peft_type": "LORA"', "[" * 100_000])
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=CONFIG):
        read_adapter(folder, ARGS)


def renamed(old: str, new: str) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FIRST.replace(old, new)] = tensors.pop(FIRST)

    return change


def poked(value: float, name: str = FIRST) -> Change:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1, 2] = value

    return change


def added(name: str) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(2)})


LAYER = "base_model.model.model.layers.0"
FAULTS: dict[str, tuple[Change, str]] = {
    "half of a pair": (lambda tensors: tensors.pop(FIRST), f"tensor '{FIRST}' is missing"),
    "NaN": (poked(float("nan")), f"{FIRST} has values that are not finite"),
    "infinity": (poked(float("-inf")), f"{FIRST} has values that are not finite"),
    "NaN in another layer": (poked(float("nan"), LATER), f"{LATER} has values that are not finite"),
    "other dims": (lambda t: t.update({FIRST: torch.zeros(4, 63)}), "has shape (4, 63), expected (4, 64)"),
    "a vector": (lambda t: t.update({FIRST: torch.zeros(4)}), "has shape (4,), expected (4, 64)"),
    "integers": (lambda t: t.update({FIRST: torch.zeros(4, 64, dtype=torch.int8)}), "is torch.int8, expected one of"),
    "a layer too many": (renamed("layers.0", "layers.2"), "is of a module that the model has not"),
    "another module": (renamed("q_proj", "qkv_proj"), "is of a module that the model has not"),
    "another prefix": (renamed("base_model.model.", ""), "is of a module that the model has not"),
    "DoRA": (added(f"{LAYER}.self_attn.q_proj.lora_magnitude_vector"), "DoRA is not supported"),
    "a bias": (added(f"{LAYER}.self_attn.q_proj.lora_B.bias"), "trained biases are not supported"),
    "the embedding": (added("base_model.model.model.embed_tokens.lora_embedding_A"), "trained embeddings"),
    "the embedding whole": (added("base_model.model.model.embed_tokens.weight"), "trained embeddings"),
    "the head": (added("base_model.model.lm_head.lora_A.weight"), "a trained head is not supported"),
    "something unknown": (added("extra"), "tensor 'extra' is unknown"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_are_refused_by_name(folder: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError) as error:
        read_adapter(folder, ARGS)
    assert message in str(error.value)
    assert str(folder / TENSORS) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [0, 1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=str,
)
def test_what_peft_itself_writes_of_such_kinds_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})
    get_peft_model(reference_model(ARGS, WEIGHTS), config).save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=CONFIG):
        read_adapter(tmp_path, ARGS)


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    for changes in ({"dim": 72, "n_heads": 9, "n_kv_heads": 3}, {"n_kv_heads": 8}, {"multiple_of": 32}):
        with pytest.raises(ValueError, match="has shape"):
            read_adapter(folder, tiny_args(**changes))
    with pytest.raises(ValueError, match=r"layers\.2\..* is missing|layers\.1\..* is of a module"):
        read_adapter(folder, tiny_args(n_layers=1))


def test_a_pickle_is_not_opened(folder: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.mkdir, (folder / "code ran",))

    torch.save({FIRST: Hostile()}, folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    with pytest.raises(
        InvalidValue, match=r"adapter_model.safetensors, as PEFT .* adapter_model.bin is a pickle, which"
    ):
        AdapterRef.of(folder)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors does not exist"):
        read_adapter(folder, ARGS)
    assert not (folder / "code ran").exists()


def test_a_folder_beside_or_above_an_adapter_is_answered_with_where_it_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter").symlink_to(folder)
    with pytest.raises(InvalidValue, match=r"there is one in .*tuned/adapter"):
        AdapterRef.of(tmp_path / "tuned")
    with pytest.raises(InvalidValue, match="got '/nowhere', which does not exist"):
        AdapterRef.of("/nowhere")


def test_any_cut_and_many_flipped_bytes_of_the_head_are_refused_or_harmless(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    identity = read_adapter(folder, ARGS).identity
    for length in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (folder / TENSORS).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=TENSORS):
            read_adapter(folder, ARGS)
    generator = torch.Generator().manual_seed(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    for at in torch.randint(0, head, (200,), generator=generator).tolist():
        (folder / TENSORS).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            found = read_adapter(folder, ARGS).identity
        except ValueError as error:
            assert str(folder) in str(error)  # noqa: PT017
        else:
            assert found == identity


def test_another_base_is_an_error_that_says_so(peft_folder: Path, tmp_path: Path) -> None:
    adapter = read_adapter(peft_folder, ARGS)
    base = Base(weights="xxh3_128:11", stored={"nf4": 90, "bfloat16": 10})
    write_adapter(tmp_path / "own", adapter.pairs, AdapterConfig.load(peft_folder), ARGS, base=base)
    assert read_base(tmp_path / "own") == base
    assert check_fits(tmp_path / "own", adapter, base, is_sorted=False)
    with pytest.raises(
        ValueError, match=r"was trained on another base: on weights stored as nf4 and bfloat16 .*:11.*:22"
    ):
        check_fits(tmp_path / "own", adapter, replace(base, weights="xxh3_128:22"), is_sorted=False)
    # Values before they were quantized have another hash, and may be the same model's.
    before = Base(weights="xxh3_128:22", stored={"bfloat16": 100})
    assert not check_fits(tmp_path / "own", adapter, before, is_sorted=False)
    # PEFT's say nothing.
    assert read_base(peft_folder) is None
    assert not check_fits(peft_folder, adapter, base, is_sorted=False)
    (tmp_path / "own" / "base.json").write_text("{}")
    with pytest.raises(ValueError, match=r"base.json must have the hash"):
        read_base(tmp_path / "own")


def test_pefts_own_inits_that_leave_the_base_alone_are_read(tmp_path: Path) -> None:
    for init in ("gaussian", "orthogonal", True, False):
        model = peft_model(ARGS, WEIGHTS, target_modules=["k_proj"], init_lora_weights=init)
        model.save_pretrained(str(tmp_path / str(init)))
        assert len(read_adapter(tmp_path / str(init), ARGS).pairs) == 2
