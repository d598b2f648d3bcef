"""A quantized Hugging Face folder that is broken, or quantized in a way not read, is one line and leaves nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.hugging_face import edit_json, edit_tensors, save_model
from tests.support.quantized import save_awq, save_bitsandbytes, save_gptq

Spoil = Callable[[Path], object]
Q = "model__layers__0__self_attn__q_proj__"
STATE = "weight.quant_state.bitsandbytes__nf4"


def edit_method(**changes: Any) -> Spoil:
    """Change what the config says of the quantization."""

    def edit(folder: Path) -> None:
        method = json.loads((folder / "config.json").read_text())["quantization_config"] | changes
        method = {key: value for key, value in method.items() if value is not ...}
        edit_json(folder / "config.json", quantization_config=method)

    return edit


def edit_part(part: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Spoil:
    """Change a tensor of wq of the first layer, or, by None, delete it."""

    def edit(folder: Path) -> None:
        path, name = folder / "model.safetensors", f"{Q.replace('__', '.')}{part}"
        state = load_file(path)
        changed = change(state.pop(name))
        save_file(state if changed is None else state | {name: changed.contiguous()}, path)

    return edit


def edit_state(**changes: Any) -> Spoil:
    def change(stored: torch.Tensor) -> torch.Tensor:
        state = json.loads(stored.numpy().tobytes()) | changes
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit_part(STATE, change)


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set the first element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def check(tmp_path: Path, refused: Callable[[Path], str], spoil: Spoil, problem: str) -> None:
    spoil(tmp_path / "hf")
    assert problem in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edit_method(bits=3), "qweight has shape (8, 64), expected (6, 64) by config.json"),
        (
            edit_method(bits=3, sym=False, checkpoint_format="gptq"),
            "3 bits are read from files of checkpoint_format gptq_v2",
        ),
        (edit_method(bits=5), "quantization_config: bits must be 2 or 3 or 4 or 8, got 5"),
        (edit_method(bits="4"), "bits must be 2 or 3 or 4 or 8, got '4'"),
        (edit_method(bits=[]), "bits must be 2 or 3 or 4 or 8, got []"),
        (edit_method(bits=...), "bits must be 2 or 3 or 4 or 8, got None"),
        (edit_method(group_size=48), "group_size must be -1 or 16 or 32 or "),
        (edit_method(group_size=64), "qzeros has shape (2, 8), expected (1, 8) by config.json"),
        (edit_method(group_size=True), "group_size must be -1 or 16 or 32 or "),
        (edit_method(sym=True), "quantization_config says sym, but a zero is not 8"),
        (edit_method(sym="yes"), "sym must be True or False, got 'yes'"),
        (edit_method(checkpoint_format="marlin"), "checkpoint_format must be 'gptq' or 'gptq_v2', got 'marlin'"),
        (edit_method(is_marlin_format=True), "is_marlin_format must be False, got True"),
        (edit_method(pack_dtype="int16"), "pack_dtype must be 'int32', got 'int16'"),
        (edit_method(quant_method="hqq"), "quantized by 'hqq' are not read, only by gptq, awq, bitsandbytes"),
        (edit_method(quant_method={}), "quantized by {} are not read, only by gptq, awq, bitsandbytes"),
        (edit_method(quant_method="awq", version="gemm"), "q_proj.qweight has shape (8, 64), expected (64, 8)"),
        (lambda d: edit_json(d / "config.json", quantization_config=...), "_proj.g_idx' is not part of a Llama model"),
        (edit_tensors(**{f"{Q}qzeros": None}), "tensor 'model.layers.0.self_attn.q_proj.qzeros' is missing"),
        (edit_tensors(**{f"{Q}scales": None}), "tensor 'model.layers.0.self_attn.q_proj.scales' is missing"),
        (edit_tensors(**{f"{Q}qweight": None}), "q_proj.g_idx' is not part of a Llama model"),
        (edit_tensors(**{f"{Q}weight": torch.ones(64, 64)}), "q_proj.weight' is not part of a Llama model"),
        (edit_tensors(**{f"{Q}bias": torch.ones(64).half()}), "q_proj.bias' is not part of a Llama model"),
        (edit_tensors(**{f"{Q}extra": torch.ones(64)}), "q_proj.extra' is not part of a Llama model"),
        (edit_part("qweight", torch.Tensor.float), "q_proj.qweight is torch.float32, expected torch.int32"),
        (edit_part("qweight", lambda q: q[:, :32]), "q_proj.qweight has shape (8, 32), expected (8, 64)"),
        (edit_part("scales", torch.Tensor.double), "q_proj.scales is torch.float64, expected one of torch.float16"),
        (edit_part("scales", first(float("nan"))), "q_proj: scales must be finite numbers"),
        (edit_part("scales", first(float("inf"))), "q_proj: scales must be finite numbers"),
        (edit_part("g_idx", first(2)), "q_proj.g_idx must be from 0 to 1"),
        (edit_part("g_idx", first(-1)), "q_proj.g_idx must be from 0 to 1"),
        (edit_part("g_idx", torch.Tensor.float), "q_proj.g_idx is torch.float32, expected one of torch.int32"),
    ],
    ids=range(32),
)
def test_gptq(tmp_path: Path, refused: Callable[[Path], str], spoil: Spoil, problem: str) -> None:
    save_gptq(tmp_path / "hf")
    check(tmp_path, refused, spoil, problem)


def test_gptq_without_the_order_that_it_says_it_has(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    save_gptq(tmp_path / "hf", shuffled=("_proj",))
    check(tmp_path, refused, edit_tensors(**{f"{Q}g_idx": None}), "q_proj.g_idx' is missing")


def test_gptq_in_8_bits_with_zeros_anywhere(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    save_gptq(tmp_path / "hf", bits=8)
    assert "8 bits cannot hold its codes less their zeros" in refused(tmp_path / "hf")


def test_a_config_of_quantized_weights_beside_plain_ones(tmp_path: Path, refused: Callable[[Path], str]) -> None:
    save_model(tmp_path / "hf")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    edit_json(tmp_path / "hf" / "config.json", quantization_config=config)
    assert "config.json has a quantization_config, but no weight is quantized so" in refused(tmp_path / "hf")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edit_method(bits=8), "bits must be 4, got 8"),
        (edit_method(version="gemv"), "version must be 'gemm', got 'gemv'"),
        (edit_method(group_size=0), "group_size must be -1 or 16 or 32 or "),
        (edit_method(group_size=64), "qzeros has shape (2, 8), expected (1, 8) by config.json"),
        (edit_method(quant_method="gptq"), "q_proj.qweight has shape (64, 8), expected (8, 64) by config.json"),
        (edit_tensors(**{f"{Q}qzeros": None}), "tensor 'model.layers.0.self_attn.q_proj.qzeros' is missing"),
        (edit_part("scales", first(float("nan"))), "q_proj: scales must be finite numbers"),
    ],
    ids=range(7),
)
def test_awq(tmp_path: Path, refused: Callable[[Path], str], spoil: Spoil, problem: str) -> None:
    save_awq(tmp_path / "hf")
    check(tmp_path, refused, spoil, problem)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (edit_method(load_in_8bit=True, load_in_4bit=False), "weights in 8 bits (load_in_8bit, LLM.int8) are not read"),
        (edit_method(load_in_4bit=False), "load_in_4bit must be True, got False"),
        (edit_method(bnb_4bit_quant_type="fp4"), "weight.quant_map is not the table of fp4"),
        (edit_method(bnb_4bit_quant_type="int4"), "bnb_4bit_quant_type must be 'nf4' or 'fp4', got 'int4'"),
        (edit_method(bnb_4bit_quant_storage="bfloat16"), "bnb_4bit_quant_storage must be 'uint8', got 'bfloat16'"),
        (edit_tensors(**{f"{Q}weight": None}), "tensor 'model.layers.0.self_attn.q_proj.weight' is missing"),
        (edit_tensors(**{f"{Q}weight__absmax": None}), "q_proj.weight.absmax' is missing"),
        (edit_tensors(**{f"{Q}weight__quant_map": None}), "q_proj.weight.quant_map' is missing"),
        (edit_tensors(**{f"{Q}weight__nested_absmax": None}), "q_proj.weight.absmax is torch.uint8, expected torch.fl"),
        (edit_tensors(**{f"{Q}weight__nested_quant_map": None}), "q_proj.weight.nested_quant_map' is missing"),
        (edit_part(STATE, lambda _: None), "q_proj.weight.quant_state.bitsandbytes__nf4' is missing"),
        (edit_part(STATE, lambda _: torch.full((9,), 91).byte()), "must be bytes of a small JSON object"),
        (edit_part(STATE, lambda _: torch.full((1 << 17,), 91).byte()), "must be bytes of a small JSON object"),
        (edit_part(STATE, lambda _: torch.ones(9)), "must be bytes of a small JSON object"),
        (edit_state(shape=[32, 128]), "bitsandbytes__nf4: shape must be [64, 64], got [32, 128]"),
        (edit_state(quant_type="fp4"), "bitsandbytes__nf4: quant_type must be 'nf4', got 'fp4'"),
        (edit_state(blocksize=48), "bitsandbytes__nf4: blocksize must be 32 or 64 or "),
        (edit_state(blocksize=128), "absmax has shape (64,), expected (32,) by config.json"),
        (edit_state(nested_blocksize=0), "bitsandbytes__nf4: nested_blocksize must be 32 or 64 or "),
        (edit_state(nested_offset="0"), "bitsandbytes__nf4: nested_offset must be a finite number, got '0'"),
        (edit_part("weight.quant_map", first(-0.5)), "weight.quant_map is not the table of nf4"),
        (edit_part("weight.nested_absmax", first(float("nan"))), "q_proj: scales (absmax) must be finite numbers"),
        (edit_part("weight", torch.Tensor.float), "q_proj.weight is torch.float32, expected torch.uint8"),
        (edit_part("weight", lambda packed: packed[1:]), "q_proj.weight has shape (2047, 1), expected (2048, 1)"),
    ],
    ids=range(24),
)
def test_bitsandbytes(tmp_path: Path, refused: Callable[[Path], str], spoil: Spoil, problem: str) -> None:
    save_bitsandbytes(tmp_path / "hf")
    check(tmp_path, refused, spoil, problem)
