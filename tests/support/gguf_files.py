"""Writes small GGUF files, right ones and wrong ones."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

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


def gguf_name(name: str) -> str:
    """llama.cpp's name of Meta's parameter `name`."""
    if name.startswith("layers."):
        _, index, rest = name.removesuffix(".weight").split(".", 2)
        return f"blk.{index}.{LAYER_NAMES[rest]}.weight"
    return f"{WHOLE_NAMES[name.removesuffix('.weight')]}.weight"


def write_gguf(
    path: Path,
    args: ModelArgs,
    weights: dict[str, torch.Tensor],
    *,
    architecture: str = "llama",
    tokenizer: str = "gpt2",
    words: str = "smollm",
    experts: int = 0,
    rope_scaling: gguf.RopeScalingType | None = None,
) -> Path:
    """A file of `weights` (Meta's names and shapes; any others are written as they are) in fp32.

    Its 96 pieces are two special tokens, 93 visible ASCII characters and "ab".
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(args.n_layers)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    if experts:
        writer.add_expert_count(experts)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(rope_scaling)
    pieces = ["<|bos|>", "<|eos|>", *map(chr, range(0x21, 0x7E)), "ab"]
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(words)
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(pieces) - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    for name, weight in weights.items():
        writer.add_tensor(name if name not in args.parameter_shapes() else gguf_name(name), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
