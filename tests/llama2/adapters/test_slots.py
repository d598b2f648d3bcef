"""What a slot holds of an adapter is this rank's share, and nothing of whoever was there before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama2.adapters.adapter import Adapter
from llama2.adapters.config import AdapterConfig
from llama2.adapters.slots import AdapterSlots
from llama2.config import ModelArgs
from llama2.parallel.plan import build_mesh
from llama2.parallel.process_group import init_process_group
from llama2.weights.spec import Spec
from tests.llama2.adapters.conftest import ARGS
from tests.support.adapters import CPU, adapted_logits, random_pairs

IDS = list(range(3, 30))


def make(config: AdapterConfig, args: ModelArgs = ARGS, *, seed: int = 0) -> Adapter:
    return Adapter(identity=bytes([seed]), pairs=random_pairs(config, args, seed=seed))


def slots_of(dtype: torch.dtype, args: ModelArgs = ARGS) -> AdapterSlots:
    init_process_group(CPU)
    spec = Spec(args=args, dtype=dtype)
    return AdapterSlots(args, build_mesh(spec, "cpu"), spec.units(), num_slots=1, max_rank=8, dtype=dtype, device=CPU)


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_slot_forgets_who_was_there(checkpoint: Path) -> None:
    """A smaller adapter of fewer modules in the slot of a larger one computes what it computes in a fresh one."""
    large = make(AdapterConfig(r=16, lora_alpha=16))
    small = make(AdapterConfig(r=2, lora_alpha=4, target_modules=("k_proj", "up_proj")), seed=1)
    fresh = adapted_logits(checkpoint, [(IDS, small)])
    used = adapted_logits(checkpoint, [(IDS, small)], before=[large])
    torch.testing.assert_close(used, fresh, atol=0, rtol=0)
    other = adapted_logits(checkpoint, [(IDS, large)])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(other, fresh, atol=0.01, rtol=0)


def test_values_that_the_dtype_cannot_hold_are_refused() -> None:
    adapter = make(AdapterConfig())
    slots_of(torch.float16).take(adapter)
    pairs = dict(adapter.pairs)
    name = "layers.1.feed_forward.w2"
    pairs[name] = replace(pairs[name], a_RC=pairs[name].a_RC * 1e6)
    with pytest.raises(ValueError, match=r"values that are too large for a model of torch.float16"):
        slots_of(torch.float16).take(Adapter(identity=b"", pairs=pairs))
    slots_of(torch.bfloat16).take(Adapter(identity=b"", pairs=pairs))


def test_more_layers_take_no_more_operations() -> None:
    """An adapter is cut while steps run: hundreds of small operations would take far longer than its bytes."""
    config = AdapterConfig(r=4, rank_pattern={r"layers\.1\.mlp\.up_proj": 2})

    def count(n_layers: int) -> int:
        args = replace(ARGS, n_layers=n_layers)
        adapter, slots = make(config, args), slots_of(torch.bfloat16, args)
        with Operations() as operations:
            slots.take(adapter)
        return operations.count

    assert count(5) <= count(2)
