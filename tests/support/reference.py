"""transformers' LlamaForCausalLM with the weights of a Meta-shaped dictionary: the outside reference for logits."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2.config import ModelArgs


def reference_model(args: ModelArgs, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """An fp32 model in eval mode. Its rotary halves are split, Meta's interleaved: wq and wk are permuted per head."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    state = {
        "model.embed_tokens.weight": weights["tok_embeddings.weight"],
        "model.norm.weight": weights["norm.weight"],
        "lm_head.weight": weights["output.weight"],
    }
    names = {
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for index in range(args.n_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        for meta_name, hf_name in names.items():
            state[f"{theirs}.{hf_name}.weight"] = weights[f"{ours}.{meta_name}.weight"]
        for meta_name, hf_name in (("wq", "q_proj"), ("wk", "k_proj")):
            weight = weights[f"{ours}.attention.{meta_name}.weight"]
            split = weight.view(-1, args.head_dim // 2, 2, args.dim).transpose(1, 2).reshape_as(weight)
            state[f"{theirs}.self_attn.{hf_name}.weight"] = split
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu")
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the state dict
    return model.eval()
