"""Owns the codes of 8 bits in a KV cache on a GPU: from values to codes and back.

Pointers say what they are: to int8 for int8, to uint8 for fp8 (e4m3). Those are converted by integer arithmetic, since
GPUs before compute capability 8.9 have no instruction for it. Shape suffixes in the kernels: H heads, D features.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(codes, dtype: tl.constexpr):
    """What the codes stand for, but for their scale: `dtype` holds each exactly. Values stay as they are."""
    if codes.dtype == tl.uint8:
        # In the place of fp16's digits they are 2^-8 of their values: the exponents have another bias.
        wide = codes.to(tl.int16)
        digits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        values = (digits.to(tl.float16, bitcast=True) * 256.0).to(dtype)
    elif codes.dtype == tl.int8:
        values = codes.to(dtype)
    else:
        values = codes
    return values


@triton.jit
def encode(x_HD, dtype: tl.constexpr):
    """Codes, and the scale of each head: see `llama2.kv_cache.quantize`."""
    largest: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    x_HD = x_HD.to(tl.float32)
    scale_H = tl.div_rn(tl.max(tl.abs(x_HD), 1), largest)
    divisor_H = tl.where(scale_H > 0, scale_H, 1.0)
    x_HD = tl.div_rn(x_HD, tl.broadcast_to(divisor_H[:, None], x_HD.shape))
    x_HD = tl.minimum(tl.maximum(x_HD, -largest), largest)
    if dtype == tl.int8:
        # Sums with 1.5 * 2^23 are whole numbers, the nearest and of two the even one.
        codes = (x_HD + 12582912.0) - 12582912.0
    else:
        bits = x_HD.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
        # Below 2^-6 codes are multiples of 2^-9, as sums with 2^14 are in fp32.
        subnormal = (tl.abs(x_HD) + 16384.0).to(tl.int32, bitcast=True) - (141 << 23)
        codes = tl.where(magnitude < (121 << 23), subnormal, normal) | ((bits >> 24) & 0x80)
    return codes.to(dtype), scale_H
