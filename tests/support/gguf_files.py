"""Writes small GGUF files, right ones and wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Type

from llama2.config import ModelArgs

LAYER_NAMES = {
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}
WHOLE_NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
# Where a block of a type has numbers in fp16, in bytes from its beginning: its scale, and what is subtracted, if any.
_HALVES: dict[Type, tuple[int, ...]] = {
    **dict.fromkeys((Type.Q4_0, Type.Q5_0, Type.Q8_0, Type.IQ4_NL, Type.IQ4_XS, Type.IQ2_XXS, Type.IQ2_XS), (0,)),
    **dict.fromkeys((Type.IQ2_S, Type.IQ3_XXS, Type.IQ3_S, Type.IQ1_S), (0,)),
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q6_K: (208,),
    Type.TQ1_0: (52,),
    Type.TQ2_0: (64,),
}


def gguf_name(name: str) -> str:
    """llama.cpp's name of Meta's parameter `name`."""
    if name.startswith("layers."):
        _, index, rest = name.removesuffix(".weight").split(".", 2)
        return f"blk.{index}.{LAYER_NAMES[rest]}.weight"
    return f"{WHOLE_NAMES[name.removesuffix('.weight')]}.weight"


def random_blocks(kind: Type, outputs: int, inputs: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Blocks of any bytes, whose scales are such that the values' deviation is 1 / sqrt(inputs)."""
    generator = np.random.default_rng(seed)
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (outputs, inputs // values, nbytes), dtype=np.uint8)
    for offset in _HALVES.get(kind, ()):
        halves = generator.uniform(0.5, 1.5, blocks.shape[:2]) * generator.choice([-1, 1], blocks.shape[:2])
        blocks[..., offset : offset + 2] = halves.astype("<f2")[..., None].view(np.uint8)
    if kind == Type.MXFP4:
        blocks[..., 0] = generator.integers(126, 129, blocks.shape[:2])
    if kind == Type.IQ1_M:
        _set_quarters(blocks, 1.0)
    data = blocks.reshape(outputs, -1)
    size = gguf.dequantize(data, kind).std() * math.sqrt(inputs)
    for offset in _HALVES.get(kind, ()):
        halves = blocks[..., offset : offset + 2].copy().view("<f2")
        blocks[..., offset : offset + 2] = (halves / size).astype("<f2").view(np.uint8)
    if kind == Type.MXFP4:
        blocks[..., 0] -= round(math.log2(size))
    if kind == Type.IQ1_M:
        _set_quarters(blocks, 1 / size)
    return data


def _set_quarters(blocks: npt.NDArray[np.uint8], scale: float) -> None:
    """Set the scale of blocks in IQ1_M, of which four bits each are in the upper halves of four bytes."""
    bits = int(np.float16(scale).view(np.uint16))
    for quarter, byte in enumerate(range(49, 56, 2)):
        blocks[..., byte] = blocks[..., byte] & 15 | (bits >> 4 * quarter & 15) << 4


def small_bpe(writer: gguf.GGUFWriter, *, words: str = "smollm") -> None:
    """96 pieces: two special tokens, 93 visible ASCII characters and "ab"."""
    pieces = ["<|bos|>", "<|eos|>", *map(chr, range(0x21, 0x7E)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(pieces) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)


def sentencepiece_vocabulary(writer: gguf.GGUFWriter, model_file: Path) -> None:
    """The vocabulary of a `tokenizer.model`, as llama.cpp's converter writes it."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = range(model.vocab_size())
    kinds = [
        (model.is_unknown, gguf.TokenType.UNKNOWN),
        (model.is_control, gguf.TokenType.CONTROL),
        (model.is_unused, gguf.TokenType.UNUSED),
        (model.is_byte, gguf.TokenType.BYTE),
    ]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(index) for index in ids])
    writer.add_token_scores([model.get_score(index) for index in ids])
    writer.add_token_types(
        [next((kind for test, kind in kinds if test(index)), gguf.TokenType.NORMAL) for index in ids]
    )
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())


def write_gguf(
    path: Path,
    args: ModelArgs,
    weights: Mapping[str, torch.Tensor],
    *,
    architecture: str = "llama",
    types: Mapping[str, Type] | None = None,
    metadata: Mapping[str, Any] | None = None,
    tokenizer: Callable[[gguf.GGUFWriter], None] = small_bpe,
    parts: int = 0,
) -> Path:
    """A file of `weights` (Meta's names and shapes; any others are written as they are), and of `parts`, the first.

    Args:
        types: of weights whose values are any, by Meta's names with or without the layer; all others are in fp32.
        metadata: beside that of the architecture and the tokenizer, or in place of it (None: not at all). The keys are
            without the name of the architecture.
    """
    tensors = list(weights.items())
    per_part = -(-len(tensors) // parts) if parts else 0
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=per_part)
    writer.add_block_count(args.n_layers)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    if args.head_dim * args.n_heads != args.dim:
        writer.add_key_length(args.head_dim)
    tokenizer(writer)
    for key, value in (metadata or {}).items():
        _replace(writer, key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)
    for name, weight in tensors:
        stem = name.removesuffix(".weight")
        kind = (types or {}).get(stem, (types or {}).get(stem.split(".", 2)[-1]))
        stored = gguf_name(name) if name in args.parameter_shapes() else name
        if kind is None:
            writer.add_tensor(stored, weight.numpy())
        elif kind in (Type.F16, Type.BF16):
            writer.add_tensor(stored, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            outputs, inputs = weight.shape
            writer.add_tensor(stored, random_blocks(kind, outputs, inputs, seed=len(stored)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if per_part == 0 else path.with_name(f"{path.stem}-00001-of-{parts:05}.gguf")


def _replace(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    (values,) = writer.kv_data
    values.pop(key, None)
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int) and value < 0:
        writer.add_int64(key, value)
    elif value is not None:
        kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add: Any = kinds[type(value)]
        add(key, value)
