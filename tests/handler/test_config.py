import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from handler.torchserve.model_config import read_model_config
from llama2.config import EngineConfig
from tests.handler.support import ROOT, config
from tests.handler.support import settings as shipped


@pytest.fixture
def base(tmp_path: Path) -> Path:
    for name in ("converted_checkpoints", "other"):
        (tmp_path / name).mkdir()
    for name in ("tokenizer.model", "args.json"):
        (tmp_path / name).touch()
    return tmp_path


def test_the_shipped_file_has_every_key_of_torchserves_example_and_is_valid(base: Path) -> None:
    settings = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    config = read_model_config(settings, base=base)
    assert config.converted_ckpt_dir == base / "converted_checkpoints"
    top = {
        "minWorkers",
        "maxWorkers",
        "maxBatchDelay",
        "responseTimeout",
        "deviceType",
        "handler",
    }
    assert top <= settings.keys()
    assert {
        *("converted_ckpt_dir", "tokenizer_path", "model_args_path", "max_seq_len", "max_batch_size", "max_new_tokens"),
        *("temperature", "top_p", "manual_seed", "mode"),
    } <= settings["handler"].keys()


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("converted_ckpt_dir", "other", lambda config: config.converted_ckpt_dir.name),
        ("tokenizer_path", "tokenizer.model", lambda config: config.tokenizer_path.name),
        ("model_args_path", "args.json", lambda config: config.model_args_path.name),
        ("dtype", "float32", lambda config: config.dtype),
        ("dtype", "bf16", lambda config: {"bfloat16": "bf16"}[config.dtype]),
        ("max_input_token_length", 44, lambda config: config.max_input_tokens),
        ("truncation", "left", lambda config: config.truncation),
        ("special_tags", "reject", lambda config: config.special_tags),
        ("dialog_turns", "strict", lambda config: config.dialog_turns),
        ("mode", "chat", lambda config: config.mode),
        ("max_new_tokens", 12, lambda config: config.sampling.max_new_tokens),
        ("temperature", 0.25, lambda config: config.sampling.temperature),
        ("top_p", 0.75, lambda config: config.sampling.top_p),
        ("threads", 3, lambda config: config.threads),
        ("step_timeout", 7, lambda config: config.step_timeout),
    ],
)
def test_each_handler_key_takes_effect(base: Path, key: str, value: Any, seen: Any) -> None:
    assert seen(read_model_config(shipped(**{key: value}), base=base)) == value


@pytest.mark.parametrize("option", dataclasses.fields(EngineConfig), ids=lambda option: option.name)
def test_each_option_of_the_engine_is_a_key(base: Path, option: dataclasses.Field[Any]) -> None:
    key: str = option.metadata.get("key", option.name)
    default: Any = option.default
    others: dict[str, Any] = {
        "kv_memory_fraction": 0.5,
        "seed": 1234,
        "max_seq_len": 77,
        "max_batch_size": 7,
        "max_lora_rank": 5,
        "max_cpu_loras": 9,
    }
    others |= {"kv_cache_dtype": "int8", "activation_dtype": "int8"}
    value: Any = others.get(option.name)
    if value is None:
        value = not default if isinstance(default, bool) else default + 1
    config = read_model_config(shipped(None, **{key: value}), base=base)
    assert getattr(config.engine, option.name) == value
    with pytest.raises(ValueError, match=rf"handler: {key} must be .*, got \[5\]"):
        read_model_config(shipped(None, **{key: [5]}), base=base)


def test_device_type_cpu_keeps_off_the_gpu_and_gpu_takes_the_best_there_is(base: Path) -> None:
    assert read_model_config(shipped({"deviceType": "cpu"}), base=base).device == "cpu"
    assert read_model_config(shipped({"deviceType": "gpu"}), base=base).device is None


@pytest.mark.parametrize(("degree", "threads"), [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_ranks_share_the_processors_and_each_gets_a_thread(
    degree: int, threads: int, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    config = read_model_config(shipped(tensor_parallel_size=degree), base=base)
    assert (config.degree, config.threads) == (degree, threads)


def test_a_large_batch_brings_its_own_step_size(base: Path) -> None:
    settings = shipped(max_batch_size=4000)
    del settings["handler"]["max_step_tokens"]
    assert read_model_config(settings, base=base).engine.max_step_tokens == 4000


def test_absolute_paths_are_kept_and_relative_ones_start_at_the_given_folder(base: Path, tmp_path: Path) -> None:
    absolute = read_model_config(shipped(converted_ckpt_dir=str(base / "other")), base=Path("/"))
    assert absolute.converted_ckpt_dir == base / "other"
    with pytest.raises(ValueError, match=r"converted_ckpt_dir is 'other', but /other does not exist"):
        read_model_config(shipped(converted_ckpt_dir="other"), base=Path("/"))


def test_environment_variables_win_over_the_file_and_an_empty_one_does_not_count(base: Path) -> None:
    environ = {"MAX_INPUT_TOKEN_LENGTH": "17", "MAX_NEW_TOKENS": "9"}
    config = read_model_config(shipped(max_input_token_length=5, max_new_tokens=6), base=base, environ=environ)
    assert (config.max_input_tokens, config.sampling.max_new_tokens) == (17, 9)
    config = read_model_config(shipped(max_new_tokens=6), base=base, environ={"MAX_NEW_TOKENS": ""})
    assert (config.max_input_tokens, config.sampling.max_new_tokens) == (511, 6)


@pytest.mark.parametrize("text", ["abc", "0", "-3", "1.5", " "])
def test_a_bad_environment_variable_is_an_error_that_names_it(base: Path, text: str) -> None:
    with pytest.raises(ValueError, match="environment variable MAX_NEW_TOKENS must be"):
        read_model_config(shipped(), base=base, environ={"MAX_NEW_TOKENS": text})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (shipped(max_new_token=5), "unknown key 'max_new_token' under handler:; did you mean 'max_new_tokens'?"),
        (
            shipped({"responseTimeOut": 5}),
            "unknown key 'responseTimeOut' at the top level; did you mean 'responseTimeout'?",
        ),
        (
            shipped({"parallelType": "tp", "torchrun": {"nproc-per-node": 2}}),
            "parallelType cannot be used here: the worker starts its ranks itself",
        ),
        (shipped({"max_seq_len": 5}), "'max_seq_len' stands at the top level, but belongs under handler:"),
        (shipped(batchSize=5), "'batchSize' stands under handler:, but belongs at the top level"),
        (shipped({"handler": None}), "the section handler: is missing"),
        (shipped({"continuousBatching": False}), "continuousBatching must be true, got false"),
        (shipped({"asyncCommunication": True}), "asyncCommunication cannot be used here"),
        (shipped({"clientTimeoutInMills": 10}), "clientTimeoutInMills cannot be used here"),
        (shipped({"deviceType": "tpu"}), "deviceType must be cpu or gpu, got tpu"),
        (shipped({"maxWorkers": None}), "maxWorkers must be 1, got None"),
        (shipped({"minWorkers": 2}), "minWorkers must be 1, got 2"),
        (shipped({"deviceIds": [4]}), "deviceIds cannot be used here: which GPUs"),
        (shipped({"responseTimeout": "5"}), "responseTimeout must be a positive integer"),
        (shipped(tensor_parallel_size=0), "tensor_parallel_size must be a positive integer, got 0"),
        (shipped(converted_ckpt_dir=None), "converted_ckpt_dir is missing"),
        (shipped(tokenizer_path=5), "tokenizer_path must be a path, got 5"),
        (shipped(mode="completion"), "mode must be one of text_completion, chat, got completion"),
        (shipped(dtype="fp8"), "dtype must be bfloat16 (bf16), float16 (fp16) or float32 (fp32), got 'fp8'"),
        (shipped(mode=["chat"]), "mode must be one of"),
        (shipped(max_seq_len=0), "max_seq_len must be a positive integer, got 0"),
        (shipped(temperature="hot"), "temperature must be a number"),
        (shipped(manual_seed="x"), "manual_seed must be an integer"),
        (shipped(max_input_token_length=512), "at most 511 with max_seq_len=512, got 512"),
    ],
)
def test_a_mistake_is_refused_in_words_that_name_it(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_model_config(settings, base=base)
    assert message in str(caught.value)
    assert str(caught.value).startswith("model-config.yaml: ")


def test_a_fingerprint_is_the_same_for_the_same_weights_and_sizes_only(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"weights")
    (tmp_path / "model_args.json").write_text("{}")
    before = config(tmp_path).fingerprint()
    assert config(tmp_path, temperature=0.1).fingerprint() == before
    assert config(tmp_path, max_seq_len=100).fingerprint() != before
    (tmp_path / "model_args.json").write_text('{"dim": 1}')
    other = config(tmp_path).fingerprint()
    (tmp_path / ".metadata").write_bytes(b"other weights")
    assert len({before, other, config(tmp_path).fingerprint()}) == 3
