"""The reference for a mask is its definition, bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama2.engine import token_masks
from llama2.engine.sampler import Sampler
from llama2.engine.sampling_params import SamplingParams
from llama2.engine.sequence import Request, Sequence

# None fills every word.
VOCAB_SIZES = [1, 33, 1000]


def random_masks(rows: int, vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(vocab_size)
    words = -(-vocab_size // 32)
    return [torch.randint(-(2**31), 2**31, (words,), generator=generator).to(torch.int32) for _ in range(rows)]


def allows(mask_W: torch.Tensor, token_id: int) -> bool:
    return bool(int(mask_W[token_id // 32]) >> token_id % 32 & 1)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_token_is_forbidden_where_its_bit_is_0(vocab_size: int) -> None:
    logits_NV = torch.randn(3, vocab_size)
    masks = random_masks(3, vocab_size)
    for row_V, mask_W, logits_V in zip(token_masks.forbid(logits_NV, masks), masks, logits_NV, strict=True):
        for token_id in range(vocab_size):
            assert row_V[token_id] == (logits_V[token_id] if allows(mask_W, token_id) else -torch.inf)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_a_gpus_way_to_read_the_bits_is_a_cpus(vocab_size: int) -> None:
    words_NW = torch.stack(random_masks(5, vocab_size))
    assert torch.equal(token_masks._is_forbidden(words_NW), token_masks._barrier(words_NW) == -torch.inf)


@pytest.mark.gpu
def test_a_gpu_forbids_what_a_cpu_forbids() -> None:
    logits_NV, masks = torch.randn(4, 1000), random_masks(4, 1000)
    assert torch.equal(token_masks.forbid(logits_NV.cuda(), masks).cpu(), token_masks.forbid(logits_NV, masks))


class Only:
    """A grammar's matcher that lets one token through."""

    failed = False

    def __init__(self, token_id: int, vocab_size: int) -> None:
        self._mask_W = torch.zeros(-(-vocab_size // 32), dtype=torch.int32)
        self._mask_W[token_id // 32] = 1 << token_id % 32

    def mask_W(self) -> torch.Tensor:
        return self._mask_W

    def accept(self, token_id: int) -> None:
        raise AssertionError


def uploads_of(sequences: list[Sequence], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[int]]:
    """How often numbers are sent to the device as tokens are chosen, and the tokens."""
    shapes: list[torch.Size] = []
    to = torch.Tensor.to

    def counted(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("non_blocking"):
            shapes.append(self.shape)
        return to(self, *args, **kwargs)

    logits_RV = torch.randn(len(sequences), 300, generator=torch.Generator().manual_seed(0))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", counted)
        tokens = [one.token_id for one in Sampler(0).sample(logits_RV, sequences).read()]
    return len(shapes), tokens


def make_sequences(constrained: int, unconstrained: int, **params: Any) -> list[Sequence]:
    """The first ones with a grammar, each for its own token."""
    request = Request(request_id="r", prompt_ids=(1,), params=SamplingParams(temperature=0, **params))
    sequences = [Sequence.of(request, row) for row in range(constrained + unconstrained)]
    for row, sequence in enumerate(sequences[:constrained]):
        sequence.matcher = Only(6 * row, 300)
    return sequences


@pytest.mark.parametrize("constrained", [1, 2, 20])
def test_the_masks_of_all_rows_leave_together(monkeypatch: pytest.MonkeyPatch, constrained: int) -> None:
    """And the rows' numbers once, where other rows have no grammar."""
    wanted = [6 * row for row in range(constrained)]
    assert uploads_of(make_sequences(constrained, 0), monkeypatch) == (1, wanted)
    count, tokens = uploads_of(make_sequences(constrained, 3), monkeypatch)
    assert (count, tokens[:constrained]) == (2, wanted)
    assert tokens[constrained:] == uploads_of(make_sequences(0, constrained + 3), monkeypatch)[1][constrained:]


@pytest.mark.parametrize("rows", [1, 20])
def test_the_biases_of_all_rows_leave_together(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    count, tokens = uploads_of(make_sequences(0, rows, logit_bias={4: 50.0, 299: 60.0, 0: -3.0}), monkeypatch)
    assert (count, tokens) == (1, [299] * rows)
