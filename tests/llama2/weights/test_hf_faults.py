"""A broken or hostile Hugging Face folder is one line and exit code 1, for next to nothing, and leaves nothing."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hugging_face import as_pickles, edit_config, edit_json, edit_tensors, safetensors_bytes, save_model

SHARD = "model-00002-of-00003.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "hf")
    return tmp_path / "hf"


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "header too small"),
        (b"\x08\0\0", "header"),
        (struct.pack("<Q", 1 << 60) + b"{}", "its header would have 1152921504606846976 bytes"),
        (safetensors_bytes(b" " * (5 << 20)), "its header would have 5242880 bytes"),
        (safetensors_bytes(b"[]"), "invalid JSON"),
        (safetensors_bytes(b"[" * 100_000), "invalid JSON"),
        (safetensors_bytes(b"\xff" * 100), "invalid UTF-8"),
        (safetensors_bytes({"a": entry("F32", [4], 0, 16)}, bytes(15)), "not fully covered"),
        (safetensors_bytes({"a": entry("F32", [4], 0, 16)}, bytes(17)), "not fully covered"),
        (safetensors_bytes({"a": entry("F32", [1 << 60], 0, 16)}, bytes(16)), "overflow"),
        (safetensors_bytes({"a": entry("F32", [1 << 40, 1 << 40], 0, 16)}, bytes(16)), "overflow"),
        (safetensors_bytes({"a": entry("F32", [5], 0, 16)}, bytes(16)), "no whole safetensors file"),
        (safetensors_bytes({"a": entry("F32", [-4], 0, 16)}, bytes(16)), "invalid value"),
        (safetensors_bytes({"a": entry("F32", [4], 0, 1 << 60)}, bytes(16)), "no whole safetensors file"),
        (
            safetensors_bytes({"a": entry("F32", [4], 0, 16), "b": entry("F32", [2], 8, 16)}, bytes(16)),
            "invalid offset",
        ),
        (safetensors_bytes({"a": entry("F32", [2], 8, 16)}, bytes(16)), "invalid offset"),
        (safetensors_bytes({"a": entry("F33", [4], 0, 16)}, bytes(16)), "unknown variant"),
        (safetensors_bytes({}), "tensors of 0 layers"),
    ],
    ids=range(18),
)
def test_a_file_that_is_no_safetensors_file(
    folder: Path, refused: Callable[[Path], str], content: bytes, problem: str
) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert problem in refused(folder)


def test_a_file_cut_anywhere(folder: Path, refused: Callable[[Path], str]) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for size in (1, 7, 8, 9, 100, 8 + header - 1, 8 + header, 8 + header + 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "is no whole safetensors file" in refused(folder)


def test_no_flipped_bit_of_a_header_passes_for_another_model(folder: Path, refused: Callable[[Path], str]) -> None:
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    header = struct.unpack("<Q", whole[:8])[0]
    text = bytes(whole[8 : 8 + header])
    metadata = text.index(b"}") if text.startswith(b'{"__metadata__"') else 0
    for at in range(metadata + 1, len(text.rstrip()), 97):
        flipped = bytearray(whole)
        flipped[8 + at] ^= 1 << at % 7
        path.write_bytes(flipped)
        refused(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "x.bin", 5])
def test_an_index_that_names_other_places(tmp_path: Path, refused: Callable[[Path], str], name: Any) -> None:
    save_model(tmp_path / "hf", shard_size="100KB")
    index = tmp_path / "hf" / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "x.safetensors")
    assert "must name files of this folder that end in .safetensors" in refused(tmp_path / "hf")


def move_tensor(folder: Path) -> None:
    content = json.loads((folder / INDEX).read_text())
    files = sorted(set(content["weight_map"].values()))
    held = content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.norm.weight"] = next(file for file in files if file != held)
    (folder / INDEX).write_text(json.dumps(content))


def repeat_tensor(folder: Path) -> None:
    path = next(path for path in sorted(folder.glob("model-*")) if "model.norm.weight" not in load_file(path))
    save_file(load_file(path) | {"model.norm.weight": torch.ones(64)}, path)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda d: next(d.glob("model-00002*")).unlink(), "is missing: model.safetensors.index.json names it"),
        (lambda d: (d / INDEX).unlink(), "holds none of model.safetensors, model.safetensors.index.json"),
        (lambda d: (d / INDEX).write_text("{}"), "must have a 'weight_map'"),
        (lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "must have a 'weight_map'"),
        (lambda d: (d / INDEX).write_text("[" * 100_000), "is not a JSON file"),
        (move_tensor, "has no tensor 'model.norm.weight', which the index says is there"),
        (repeat_tensor, "tensor 'model.norm.weight' is in "),
        (lambda d: save_file({"a": torch.ones(1)}, d / "model.safetensors"), "holds both model.safetensors and"),
    ],
    ids=range(8),
)
def test_shards_and_an_index_that_do_not_fit(
    tmp_path: Path, refused: Callable[[Path], str], spoil: Callable[[Path], object], problem: str
) -> None:
    save_model(tmp_path / "hf", shard_size="100KB")
    spoil(tmp_path / "hf")
    assert problem in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edit_config(hidden_size=128), "has shape (512, 64), expected (512, 128) by config.json"),
        (edit_config(vocab_size=1024), "has shape (512, 64), expected (1024, 64) by config.json"),
        (edit_config(intermediate_size=97), "mlp.down_proj.weight has shape (64, 96), expected (64, 97)"),
        (edit_config(num_key_value_heads=4), "self_attn.k_proj.weight has shape (32, 64), expected (64, 64)"),
        (edit_config(num_hidden_layers=3), "config.json says n_layers=3, but "),
        (edit_config(num_hidden_layers=1 << 60), "config.json says n_layers=1152921504606846976, but "),
        (edit_config(hidden_size=1 << 60, intermediate_size=1 << 60), "has shape (512, 64), expected (512, "),
        (edit_config(quantization_config={"quant_method": "gptq"}), "bits must be 2 or 3 or 4 or 8, got None"),
        (edit_config(quantization_config={}), "quantized by None are not read, only by gptq, awq, bitsandbytes"),
        (edit_config(model_type="gpt2"), "model_type must be llama or mistral, got 'gpt2'"),
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "tokenizer.model").unlink(), "has no tokenizer"),
        (edit_tensors(lm_head__weight=None), "tensor 'lm_head.weight' is missing"),
        (edit_tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(64)), "q_proj.bias' is not part of a Llama"),
        (edit_tensors(model__norm__weight=torch.ones(64, dtype=torch.int32)), "is torch.int32, expected one of"),
        (edit_tensors(model__norm__weight=torch.ones(64).to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn, expected"),
        (edit_tensors(model__norm__weight=torch.ones(64, dtype=torch.float64)), "is torch.float64, expected one of"),
        (edit_tensors(model__norm__weight=torch.ones(8, 8)), "model.norm.weight has shape (8, 8), expected (64,)"),
        (
            lambda d: torch.save({}, d / "consolidated.00.pth"),
            "holds Meta's files and holds weights in Hugging Face's format",
        ),
        (
            lambda d: (d / ".metadata").touch(),
            "holds a converted checkpoint and holds weights in Hugging Face's format: only one",
        ),
    ],
    ids=range(20),
)
def test_a_folder_that_contradicts_itself(
    folder: Path, refused: Callable[[Path], str], spoil: Callable[[Path], object], problem: str
) -> None:
    spoil(folder)
    assert problem in refused(folder)


def test_a_head_that_is_not_what_it_is_tied_to(folder: Path, refused: Callable[[Path], str]) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    assert "ties lm_head.weight to the embedding, from which it differs" in refused(folder)


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    save_model(tmp_path / "hf", vocab_size=500)
    assert "the tokenizer has 512 ids, but the model only 500" in refused(tmp_path / "hf")


class Hostile:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder / "code ran"),)


def compress(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda path: torch.save({"model.norm.weight": Hostile(path.parent)}, path), "is refused"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is not a readable .bin file"),
        (lambda path: path.write_bytes(b"junk"), "is not a readable .bin file"),
        (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "is not a readable .bin file"),
        (compress, "is not a readable .bin file (truncated or damaged?): it is compressed"),
        (lambda path: torch.save([1], path), "must hold a dictionary of tensors, got list"),
        (lambda path: torch.save({"a": 5}, path), "'a' is not a plain tensor"),
        (lambda path: torch.save({5: torch.ones(1)}, path), "5 is not a plain tensor"),
        (lambda path: torch.save({"a": torch.eye(3).to_sparse()}, path), "'a' is not a plain tensor"),
    ],
    ids=range(9),
)
def test_a_pickle_that_is_no_dictionary_of_tensors(
    folder: Path, refused: Callable[[Path], str], spoil: Callable[[Path], object], problem: str
) -> None:
    as_pickles(folder)
    spoil(folder / "pytorch_model.bin")
    assert problem in refused(folder)
    assert not (folder / "code ran").exists()
