"""Owns the Llama architecture: what is computed from ids to logits.

Knows no torch.distributed: a rank that holds a share of the weights gives the model a `Collectives`. Nor does it know
how a step of the arithmetic is done on which device: that is its `Kernels`. Weights that are applied to the same input
are one, Meta's `wq`, `wk`, `wv` as `wqkv` and `w1`, `w3` as `w13`; else names are Meta's.

Shape suffixes: T tokens of a step, R rows whose logits are asked for, C = dim, H query heads, K key heads,
D = head_dim, F = hidden_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as functional
from torch import nn

from llama2.batch import Batch
from llama2.config import ModelArgs
from llama2.kernels import Kernels
from llama2.parallel.collectives import Collectives, SingleRank


class Module(nn.Module):
    """A module whose call is its `forward` and no more: hooks cost a tenth of a small model's step on a CPU."""

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


class Transformer(Module):
    """The whole model. `finish` must be called once its weights are in place."""

    rope: torch.Tensor

    def __init__(self, args: ModelArgs, kernels: Kernels) -> None:
        super().__init__()
        self.args = args
        self.kernels = kernels
        self.tok_embeddings = VocabEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, index, kernels) for index in range(args.n_layers))
        self.norm = AddNorm(args, kernels)
        self.output = VocabProjection(args.dim, args.vocab_size, kernels)

    def finish(self, max_seq_len: int) -> None:
        """Make ready to run positions below `max_seq_len`.

        The rotary table is `(max_seq_len, D / 2, 2)` of cos and sin in fp32 (RoFormer, arXiv:2104.09864).
        """
        device, half = self.norm.weight.device, self.args.head_dim // 2
        inverse = self.args.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), inverse)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin()), dim=-1), persistent=False)
        # nn.Module looks these up in Python at every access. As plain attributes they are found at once.
        for module in self.modules():
            module.__dict__ |= module._parameters | module._modules

    def forward(self, tokens_T: torch.Tensor, batch: Batch, rows_R: torch.Tensor) -> torch.Tensor | None:
        """Run one step: store the new keys and values, and return fp32 logits (R, V) of `rows_R` on rank 0."""
        x_TC: torch.Tensor = self.tok_embeddings(tokens_T)
        rope_TD2 = self.rope[batch.positions_T]
        layers = cast("Iterable[TransformerBlock]", self.layers)
        x_TC, branch_TC = self.kernels.run_layers(layers, x_TC, rope_TD2, batch)
        _, x_RC = self.norm(x_TC[rows_R], branch_TC[rows_R])
        return self.output(x_RC)


class TransformerBlock(Module):
    """One layer. What a branch adds to the residual stream travels beside it until the next norm, which adds it."""

    def __init__(self, args: ModelArgs, index: int, kernels: Kernels) -> None:
        super().__init__()
        self.attention = Attention(args, index, kernels)
        self.feed_forward = FeedForward(args, kernels)
        self.attention_norm = AddNorm(args, kernels)
        self.ffn_norm = AddNorm(args, kernels)

    def forward(
        self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None, rope_TD2: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_TC, normed_TC = self.attention_norm(x_TC, branch_TC)
        x_TC, normed_TC = self.ffn_norm(x_TC, self.attention(normed_TC, rope_TD2, batch))
        return x_TC, self.feed_forward(normed_TC)


class Attention(Module):
    def __init__(self, args: ModelArgs, index: int, kernels: Kernels) -> None:
        super().__init__()
        self.index = index
        self.kernels = kernels
        self.wqkv = Linear(args.dim, (args.n_heads + 2 * args.n_kv_heads) * args.head_dim, kernels)
        self.wo = RowLinear(args.n_heads * args.head_dim, args.dim, kernels)

    def forward(self, x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> torch.Tensor:
        q_THD = self.kernels.rotate_and_store(self.wqkv(x_TC), rope_TD2, batch, self.index)
        return self.wo(self.kernels.attend(q_THD, batch, self.index).flatten(1))


class FeedForward(Module):
    def __init__(self, args: ModelArgs, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.w13 = Linear(args.dim, 2 * args.hidden_dim, kernels)
        self.w2 = RowLinear(args.hidden_dim, args.dim, kernels)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.w2(self.kernels.gated_linear(x_TC, self.w13.weight))


class AddNorm(Module):
    """Adds a branch to the residual stream, and normalizes the sum: returns both (RMSNorm, arXiv:1910.07467)."""

    def __init__(self, args: ModelArgs, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(args.dim))
        self.eps = args.norm_eps
        self.kernels = kernels

    def forward(self, x_TC: torch.Tensor, branch_TC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernels.add_rms_norm(x_TC, branch_TC, self.weight, self.eps)


class Linear(Module):
    """A linear layer that may hold a share of its output features."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernels.linear(x, self.weight)


class RowLinear(Linear):
    """A linear layer that may hold a share of its input features: the ranks' partial results are summed."""

    collectives: Collectives = SingleRank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_reduce(super().forward(x))


class VocabEmbedding(Module):
    """An embedding that may hold the rows [first, first + len(weight)): ids outside give zero, and the ranks sum."""

    collectives: Collectives = SingleRank()

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.first = 0

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.collectives.world_size == 1:
            return functional.embedding(tokens_T, self.weight)
        local_T = tokens_T - self.first
        elsewhere_T = (local_T < 0) | (local_T >= self.weight.shape[0])
        x_TC = functional.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return self.collectives.all_reduce(x_TC.masked_fill(elsewhere_T[:, None], 0.0))


class VocabProjection(Module):
    """The output head, which may hold a share of the vocabulary: rank 0 gets all logits, in fp32."""

    collectives: Collectives = SingleRank()

    def __init__(self, dim: int, vocab_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.kernels = kernels
        self.sizes: tuple[int, ...] = (vocab_size,)

    def forward(self, x_RC: torch.Tensor) -> torch.Tensor | None:
        return self.collectives.gather(self.kernels.linear(x_RC, self.weight), self.sizes)
