"""docs/options.md is true: it has every option and no other, with the default that the code has. And the shipped
model-config.yaml has every key of its section `handler`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from handler.config import KEYS, HandlerConfig
from handler.native import _FIELDS
from handler.openai.completions import CompletionBody
from handler.torchserve.model_config import _IMPOSSIBLE, _SECTIONS
from llama2.config import LORA_RANK, EngineConfig
from llama2.engine.sampling_params import COMPLETION_TOKENS, SamplingParams
from llama2.kv_cache import KV_FRACTION, MAX_BATCH_SIZE
from llama2.names import SECOND_NAME

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
SHIPPED = yaml.safe_load((ROOT / "model-config.yaml").read_text(encoding="utf-8"))


def table(heading: str) -> dict[str, tuple[str, ...]]:
    """The two cells after each key, in the table under a heading; several keys may share a row."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in section.splitlines() if row.startswith("| ")][1:]
    return {key.strip("`"): (one.strip(), other.strip()) for keys, one, other, *_ in rows for key in keys.split()}


# By key: the name in Python, and the default.
ROWS = table("Of the server and of Python")
TORCHSERVE = table("Of TorchServe")
# By field: the default, and where it can be said.
REQUESTS = table("Of a request alone")
# What no option holds, because it depends on the model, the machine or the kind of request.
WORKED_OUT = {
    "max_seq_len": "what the model was trained for",
    "max_batch_size": f"by memory, at most {MAX_BATCH_SIZE['cuda']}, on a CPU {MAX_BATCH_SIZE['cpu']}",
    "kv_memory_fraction": f"{KV_FRACTION['cuda']}, on a CPU {KV_FRACTION['cpu']}",
    "max_lora_rank": str(LORA_RANK),
    "max_cpu_loras": "64, at least `max_loras`",
    "seed": "another at every start",
    "max_new_tokens": f"as many as fit in a chat, {COMPLETION_TOKENS} of a completion",
}


def shown(name: str, default: object) -> str:
    return WORKED_OUT[name] if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def test_the_table_and_the_shipped_file_have_every_key_and_no_other() -> None:
    assert ROWS.keys() == SHIPPED["handler"].keys() == KEYS


def test_torchserves_keys_are_those_that_are_taken_or_refused_with_the_shipped_values() -> None:
    assert TORCHSERVE.keys() == _SECTIONS[""]
    assert {key for key, (_, text) in TORCHSERVE.items() if text.startswith("refused: ")} == _IMPOSSIBLE.keys()
    values = {key: shown(key, value) for key, value in SHIPPED.items() if key != "handler"}
    assert {key: value for key, (value, _) in TORCHSERVE.items() if value} == values


def test_the_other_fields_of_a_request_have_their_defaults_and_apis() -> None:
    fields = {field.name for field in dataclasses.fields(SamplingParams)} - ROWS.keys()
    assert REQUESTS.keys() == fields
    for field, (default, where) in REQUESTS.items():
        value = getattr(SamplingParams(), field)
        assert default == (str(value).lower() if isinstance(value, (int, float)) else "none"), field
        assert where == ("everywhere" if field in _FIELDS else "OpenAI's API, Python"), field
        assert field in CompletionBody.model_fields


@pytest.mark.parametrize("option", dataclasses.fields(EngineConfig), ids=lambda option: option.name)
def test_an_option_of_the_engine_has_its_default(option: dataclasses.Field[object]) -> None:
    row = ROWS[option.metadata.get("key", option.name)]
    second = option.metadata.get(SECOND_NAME)
    keyword = f"`LLM({option.name})`" + (f" or `{second}`" if second else "")
    assert row == (keyword, shown(option.name, option.default))


@pytest.mark.parametrize("key", ["max_new_tokens", "temperature", "top_p"])
def test_a_field_of_a_request_has_its_default(key: str) -> None:
    assert ROWS[key] == (f"`SamplingParams({key})`", shown(key, getattr(SamplingParams(), key)))


def test_the_servers_own_keys_have_their_defaults(tmp_path: Path) -> None:
    config = HandlerConfig.read({"converted_ckpt_dir": str(tmp_path)}, base=tmp_path)
    for key in ("truncation", "special_tags", "dialog_turns", "mode", "step_timeout", "allow_runtime_lora_updating"):
        assert ROWS[key] == ("", str(getattr(config, key)).lower())
    assert ROWS["tensor_parallel_size"][1] == str(config.degree)
    assert config.engine == EngineConfig()
    assert config.sampling == SamplingParams()


def test_the_shipped_file_has_these_defaults_but_for_two(tmp_path: Path) -> None:
    settings = SHIPPED["handler"] | {"converted_ckpt_dir": "."}
    own = ("tensor_parallel_size", "manual_seed")
    assert " and ".join(f"`{key}: {settings[key]}`" for key in own) in PAGE
    shipped = HandlerConfig.read(settings | dict.fromkeys(own), base=tmp_path)
    assert shipped == HandlerConfig.read({"converted_ckpt_dir": "."}, base=tmp_path)
