"""Writes small models as transformers saves them, and files of tensors byte by byte, right and wrong ones."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from tests.support.tokenizers import tiny_sentencepiece

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    # So large that attention is far from uniform, and rotations show in the logits.
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save_model(
    folder: Path, *, kind: str = "llama", dtype: torch.dtype = torch.float32, shard_size: str = "5GB", **config: Any
) -> PreTrainedModel:
    """A random model in eval mode, saved to `folder` with a SentencePiece tokenizer of 512 pieces."""
    torch.manual_seed(0)
    if kind == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**SIZES | config))
    else:
        model = MistralForCausalLM(MistralConfig(**SIZES | config))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    torch.nn.Module.to(model, dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny_sentencepiece(folder)
    return model.eval()


def as_pickles(folder: Path) -> None:
    """Put `pytorch_model.bin` in the place of a folder's safetensors, or as many as there are, with their index."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        torch.save(load_file(path), folder / _pickled(path.name))
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: _pickled(file) for name, file in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _pickled(name: str) -> str:
    return name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON object, or take out those whose value is `...`."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def edit_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    """Set (or, by None, delete) tensors; `__` in a keyword stands for a dot."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        state: dict[str, Any] = load_file(folder / "model.safetensors")
        state |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors")

    return edit


def edit_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
