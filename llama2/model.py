"""Owns the Llama architecture: what is computed from ids to logits.

Knows no torch.distributed: a rank that holds a share of the weights has a `Collectives` that sums over all. Nor does it
know how a step of the arithmetic is done on which device, or what a weight looks like there: that is its `Kernels`.
Weights that are applied to the same input are one, Meta's `wq`, `wk`, `wv` as `wqkv` and `w1`, `w3` as `w13`; else
names are Meta's.

Shape suffixes: T tokens of a step, R rows whose logits are asked for, C = dim, H query heads, K key heads,
D = head_dim, F = hidden_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llama2.batch import Batch
from llama2.config import ModelArgs
from llama2.kernels import Kernels
from llama2.parallel.collectives import Collectives
from llama2.weights.formats import Weight


class Transformer:
    """The whole model, or a rank's share of it, ready to run positions below `max_seq_len`."""

    def __init__(
        self,
        args: ModelArgs,
        kernels: Kernels,
        collectives: Collectives,
        weights: Mapping[str, Weight],
        products: Mapping[str, Any],
        *,
        vocab_sizes: tuple[int, ...],
        max_seq_len: int,
    ) -> None:
        """`weights` has the embedding and the norms, `products` what `Kernels.prepare` made of all others.

        Rank r has `vocab_sizes[r]` rows of the embedding and of the head, which is `output`.
        """
        self.args = args
        self.kernels = kernels
        self.collectives = collectives
        self._embedding = weights["tok_embeddings"]
        self._norm = weights["norm"].dequantize()
        self.output = products["output"]
        self.vocab_sizes = vocab_sizes
        self.dtype, self.device = self._norm.dtype, self._norm.device
        self._rope = rotary_table(args, max_seq_len, self.device)
        self.layers = [Layer(args, index, kernels, collectives, weights, products) for index in range(args.n_layers)]
        self._run_layers = kernels.chain(self.layers)

    def __call__(self, tokens_T: torch.Tensor, batch: Batch, rows_R: torch.Tensor) -> torch.Tensor | None:
        """Run one step: store the new keys and values, and return fp32 logits (R, V) of `rows_R` on rank 0."""
        x_RC = self.features(tokens_T, batch, rows_R)
        return self.collectives.gather(self.kernels.linear(x_RC, self.output), self.vocab_sizes)

    def features(self, tokens_T: torch.Tensor, batch: Batch, rows_R: torch.Tensor) -> torch.Tensor:
        """What the head is applied to, (R, C), of `rows_R`; otherwise as a call."""
        rope_TD2 = self._rope[batch.positions_T]
        x_TC, branch_TC = self._run_layers(self._embed(tokens_T), rope_TD2, batch)
        _, x_RC = self.kernels.add_rms_norm(x_TC[rows_R], branch_TC[rows_R], self._norm, self.args.norm_eps)
        return x_RC

    def _embed(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Ids of other ranks' rows give zero, and the ranks sum."""
        rank, size = self.collectives.rank, self.vocab_sizes[self.collectives.rank]
        if size == self.args.vocab_size:
            return self._embedding.rows(tokens_T).to(self.dtype)
        local_T = tokens_T - sum(self.vocab_sizes[:rank])
        elsewhere_T = (local_T < 0) | (local_T >= size)
        x_TC = self._embedding.rows(local_T.masked_fill(elsewhere_T, 0)).to(self.dtype)
        return self.collectives.all_reduce(x_TC.masked_fill(elsewhere_T[:, None], 0.0))


class Layer:
    """One layer. What a branch adds to the residual stream travels beside it until the next norm, which adds it."""

    def __init__(
        self,
        args: ModelArgs,
        index: int,
        kernels: Kernels,
        collectives: Collectives,
        weights: Mapping[str, Weight],
        products: Mapping[str, Any],
    ) -> None:
        name = f"layers.{index}"
        self.index = index
        self.eps = args.norm_eps
        self.kernels = kernels
        self.collectives = collectives
        self.attention_norm = weights[f"{name}.attention_norm"].dequantize()
        self.wqkv = products[f"{name}.attention.wqkv"]
        self.wo = products[f"{name}.attention.wo"]
        self.ffn_norm = weights[f"{name}.ffn_norm"].dequantize()
        self.w13 = products[f"{name}.feed_forward.w13"]
        self.w2 = products[f"{name}.feed_forward.w2"]

    def __call__(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, rope_TD2: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kernels, all_reduce = self.kernels, self.collectives.all_reduce
        x_TC, normed_TC = kernels.add_rms_norm(x_TC, branch_TC, self.attention_norm, self.eps)
        qkv_TX = self._linear("attention.wqkv", normed_TC, self.wqkv, batch)
        q_THD = kernels.rotate_and_store(qkv_TX, rope_TD2, batch, self.index)
        attended_THD = kernels.attend(q_THD, batch, self.index)
        branch_TC = all_reduce(self._linear("attention.wo", attended_THD.flatten(1), self.wo, batch))
        x_TC, normed_TC = kernels.add_rms_norm(x_TC, branch_TC, self.ffn_norm, self.eps)
        if batch.adapters is None:
            gated_TF = kernels.gated_linear(normed_TC, self.w13)
        else:
            gated_TF = kernels.silu_mul(self._linear("feed_forward.w13", normed_TC, self.w13, batch))
        return x_TC, all_reduce(self._linear("feed_forward.w2", gated_TF, self.w2, batch))

    def _linear(self, name: str, x: torch.Tensor, weight: Any, batch: Batch) -> torch.Tensor:
        """The product `name` of `adapters.products.PRODUCTS`, with what the rows' adapters add to it."""
        y = self.kernels.linear(x, weight)
        if batch.adapters is None:
            return y
        return self.kernels.add_lora(y, x, batch.adapters.layers[self.index][name], batch.adapters.slots_T)


def rotary_table(args: ModelArgs, max_seq_len: int, device: torch.device) -> torch.Tensor:
    """Cos and sin of each position's angles, `(max_seq_len, D / 2, 2)` in fp32 (RoFormer, arXiv:2104.09864)."""
    half = args.head_dim // 2
    inverse = args.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
    if args.scaled_rope is not None:
        inverse = inverse / torch.tensor([args.scaled_rope.divisor(each) for each in inverse.tolist()], device=device)
    positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) / args.rope_scaling
    angles = torch.outer(positions, inverse)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)
