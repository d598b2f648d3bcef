"""Our NF4 and FP4 are bitsandbytes', bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from llama2.weights.formats.lut4 import TABLES, Lut4


@pytest.mark.parametrize("table", ["nf4", "fp4"])
def test_the_tables(table: str) -> None:
    ours, theirs = torch.tensor(TABLES[table]), get_4bit_type(table, device="cpu")
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantization_to_nf4(dtype: torch.dtype) -> None:
    """Codes and scales, to the bit, also where a value is halfway between two of the table."""
    torch.manual_seed(0)
    table = torch.tensor(TABLES["nf4"])
    ties = torch.cat([(table[1:] + table[:-1]) / 2, table, torch.ones(1)]).repeat(2)
    values = torch.cat([torch.randn(4000, 64), torch.zeros(1, 64), torch.randn(1, 64) * 1e-39])
    values[:1000] = ties * torch.rand(1000, 1) * torch.tensor([1.0, -1.0]).repeat(500)[:, None]
    values = values.to(dtype).reshape(-1, 128)
    packed, state = quantize_4bit(values, blocksize=64, quant_type="nf4")
    ours = Lut4(table="nf4", group=64).quantize(values)
    theirs = packed.view(values.shape[0], -1)
    assert torch.equal(ours["codes"], theirs >> 4 | theirs << 4)
    assert torch.equal(ours["scales"].flatten(), state.absmax)
