"""Owns what all launches share: programmatic dependent launch, and how the cache's values lie.

With programmatic dependent launch (compute capability 9.0; CUDA C++ Programming Guide, 4.5) a kernel starts while the
one before it on the stream still runs. Every program of it must call `await_earlier` before it reads what an earlier
kernel wrote and before it writes anything: then each kernel ends after all that were launched before it, as without it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


def launch_options(pdl: bool) -> dict[str, Any]:
    """What a launch passes beside its own arguments."""
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def cache_strides(keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
    """How far blocks, positions and heads of a cache (blocks, positions, heads, D) lie apart: any order of them."""
    assert keys.stride() == values.stride()
    assert keys.stride(3) == 1
    return dict(zip(("BLOCK_STRIDE", "POSITION_STRIDE", "HEAD_STRIDE"), keys.stride(), strict=False))


def cache_tensors(
    keys: torch.Tensor, values: torch.Tensor, scales: tuple[torch.Tensor | None, torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """Keys, values and their scales as kernels take them: codes of fp8 as bytes, and where there are no scales anything
    in their place."""
    key_scales, value_scales = scales
    if key_scales is None or value_scales is None:
        return keys, values, keys, values
    if keys.dtype == torch.float8_e4m3fn:
        keys, values = keys.view(torch.uint8), values.view(torch.uint8)
    return keys, values, key_scales, value_scales


@triton.jit
def announce(PDL: tl.constexpr):
    """The next kernel may start as soon as all programs of this one have."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_earlier(PDL: tl.constexpr):
    """From here on, all that earlier kernels wrote is there, and none of them reads any more."""
    if PDL:
        tl.extra.cuda.gdc_wait()
