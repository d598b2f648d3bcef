"""Writes small Hugging Face folders that are quantized, packed as the formats' papers and programs say, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tests.support.hugging_face import edit_json, save_model

# From a weight's name and values what it becomes, and the tensors that stand for it; None: it stays plain.
Store = Callable[[str, torch.Tensor], "tuple[torch.Tensor, dict[str, torch.Tensor]] | None"]


def save_quantized(folder: Path, config: dict[str, Any], store: Store, **options: Any) -> PreTrainedModel:
    """A random model whose linear layers are stored by `store`; returned with the values that they stand for."""
    model = save_model(folder, **options)
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            stored = store(name, module.weight.data)
            if stored is not None:
                module.weight.data = stored[0].to(module.weight.dtype)
                del state[f"{name}.weight"]
                state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored[1].items()}
    save_file(state, path)
    edit_json(folder / "config.json", quantization_config=config)
    return model


def save_gptq(
    folder: Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = False,
    version: str | None = "gptq_v2",
    shuffled: tuple[str, ...] = (),
    scales: torch.dtype = torch.float16,
    plain: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedModel:
    """`shuffled` are ends of names whose inputs belong to groups in no order, as with desc_act."""

    def store(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        if name.endswith(plain or ("none",)):
            return None
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // (group_size if group_size > 0 else inputs)
        if name.endswith(shuffled or ("none",)):
            groups = groups[torch.randperm(inputs)]
        codes, zeros, steps = random_integers(outputs, inputs, int(groups.max()) + 1, bits=bits, dtype=scales)
        if sym:
            zeros.fill_(1 << (bits - 1))
        elif version != "gptq_v2":
            zeros.clamp_(min=1)
        stored = {
            "qweight": pack_bits(codes, bits).T,
            "qzeros": pack_bits((zeros if version == "gptq_v2" else zeros - 1).T, bits),
            "scales": steps.T,
            "g_idx": groups.int(),
        }
        return steps.float()[:, groups] * (codes - zeros[:, groups]), stored

    config: dict[str, Any] = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym}
    config |= {"desc_act": bool(shuffled)} | ({"checkpoint_format": version} if version else {})
    return save_quantized(folder, config, store, **options)


def save_awq(folder: Path, *, group_size: int = 32, **options: Any) -> PreTrainedModel:
    def store(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        outputs, inputs = weight.shape
        groups = torch.arange(inputs) // (group_size if group_size > 0 else inputs)
        codes, zeros, scales = random_integers(outputs, inputs, int(groups.max()) + 1, bits=4)
        stored = {"qweight": pack_awq(codes.T), "qzeros": pack_awq(zeros.T), "scales": scales.T}
        return scales.float()[:, groups] * (codes - zeros[:, groups]), stored

    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return save_quantized(folder, config, store, **options)


def save_bitsandbytes(
    folder: Path, *, table: str = "nf4", nested: bool = True, block_size: int = 64, **options: Any
) -> PreTrainedModel:
    """As transformers saves a model that it loaded with a BitsAndBytesConfig; the values are bitsandbytes' own."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def store(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        packed, state = quantize_4bit(weight, blocksize=block_size, compress_statistics=nested, quant_type=table)
        parts = {f"weight.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
        # As one row, since its CPU kernel takes another scale where a block runs over the end of one.
        state.shape = torch.Size((1, weight.numel()))
        return dequantize_4bit(packed, state).view(weight.shape), {"weight": packed} | parts

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": table,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_quant_storage": "uint8",
    }
    return save_quantized(folder, config, store, **options)


def random_integers(
    outputs: int, inputs: int, groups: int, *, bits: int, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes (F, C), zeros (F, G) and scales (F, G), for values of about 0.2."""
    codes = torch.randint(1 << bits, (outputs, inputs))
    zeros = torch.randint((1 << bits) // 4, (1 << bits) * 3 // 4 + 1, (outputs, groups))
    zeros[0] = 0
    scales = (0.2 + 0.4 * torch.rand(outputs, groups)) / (1 << (bits - 1))
    return codes, zeros, scales.to(dtype)


def pack_bits(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers (N, M) as int32 (N, M · bits / 32): one row of bits, the lowest of each first."""
    planes = np.unpackbits(values.numpy().astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return torch.from_numpy(np.packbits(planes.reshape(len(values), -1), axis=-1, bitorder="little").view(np.int32))


def pack_awq(values: torch.Tensor) -> torch.Tensor:
    """Integers (N, M) as int32 (N, M / 8): AutoAWQ's order of eight columns in a word."""
    words = np.zeros((len(values), values.shape[1] // 8), np.uint32)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= values[:, column::8].numpy().astype(np.uint32) << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))
