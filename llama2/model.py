"""Owns the Llama architecture: what is computed from ids to logits. Meta's parameter names, verbatim.

Knows no torch.distributed: a rank that holds a share of the weights gives the model a `Collectives`, and the head
counts follow from the shapes of the weights that it holds.

Shape suffixes: T tokens of a step, R rows whose logits are asked for, C = dim, H query heads, K key heads,
D = head_dim, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from llama2.attention import Batch, paged_attention
from llama2.collectives import Collectives, SingleRank
from llama2.config import ModelArgs


class Transformer(nn.Module):
    """The whole model. `init_buffers` must be called once its weights are in place."""

    rope: torch.Tensor

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = VocabEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args, index) for index in range(args.n_layers))
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = VocabProjection(args.dim, args.vocab_size)

    def init_buffers(self, max_seq_len: int) -> None:
        """Make the rotary table, `(max_seq_len, D / 2, 2)` of cos and sin in fp32 (RoFormer, arXiv:2104.09864)."""
        device, half = self.norm.weight.device, self.args.head_dim // 2
        inverse = self.args.rope_theta ** -(torch.arange(half, dtype=torch.float32, device=device) / half)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float32, device=device), inverse)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin()), dim=-1), persistent=False)

    def forward(self, tokens_T: torch.Tensor, batch: Batch, rows_R: torch.Tensor) -> torch.Tensor | None:
        """Run one step: store the new keys and values, and return fp32 logits (R, V) of `rows_R` on rank 0."""
        x_TC = self.tok_embeddings(tokens_T)
        rope_TD2 = self.rope[batch.positions_T]
        for layer in self.layers:
            x_TC = layer(x_TC, rope_TD2, batch)
        return self.output(self.norm(x_TC[rows_R]))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs, index: int) -> None:
        super().__init__()
        self.attention = Attention(args, index)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> torch.Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), rope_TD2, batch)
        return x_TC + self.feed_forward(self.ffn_norm(x_TC))


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, index: int) -> None:
        super().__init__()
        self.index = index
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = RowLinear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x_TC: torch.Tensor, rope_TD2: torch.Tensor, batch: Batch) -> torch.Tensor:
        tokens = x_TC.shape[0]
        q_THD = rotate(self.wq(x_TC).view(tokens, -1, self.head_dim), rope_TD2)
        k_TKD = rotate(self.wk(x_TC).view(tokens, -1, self.head_dim), rope_TD2)
        v_TKD = self.wv(x_TC).view(tokens, -1, self.head_dim)
        return self.wo(paged_attention(q_THD, k_TKD, v_TKD, batch, self.index).flatten(1))


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = RowLinear(args.hidden_dim, args.dim)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x_TC)) * self.w3(x_TC))


class RowLinear(nn.Linear):
    """A linear layer that may hold a share of its input features: the ranks' partial results are summed."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.collectives: Collectives = SingleRank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.collectives.all_reduce(F.linear(x, self.weight))


class VocabEmbedding(nn.Module):
    """An embedding that may hold the rows [first, first + len(weight)): ids outside give zero, and the ranks sum."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.first = 0
        self.collectives: Collectives = SingleRank()

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.collectives.world_size == 1:
            return F.embedding(tokens_T, self.weight)
        local_T = tokens_T - self.first
        elsewhere_T = (local_T < 0) | (local_T >= self.weight.shape[0])
        x_TC = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return self.collectives.all_reduce(x_TC.masked_fill(elsewhere_T[:, None], 0.0))


class VocabProjection(nn.Module):
    """The output head, which may hold a share of the vocabulary: rank 0 gets all logits, in fp32."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.sizes: tuple[int, ...] = (vocab_size,)
        self.collectives: Collectives = SingleRank()

    def forward(self, x_RC: torch.Tensor) -> torch.Tensor | None:
        logits_RV = self.collectives.gather(F.linear(x_RC, self.weight), self.sizes)
        return None if logits_RV is None else logits_RV.float()


def rotate(x_THD: torch.Tensor, rope_TD2: torch.Tensor) -> torch.Tensor:
    """Turn each pair of neighbouring features (2i, 2i + 1) by its position's angle, in fp32 as Meta's code does."""
    even, odd = x_THD.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope_TD2[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x_THD)
