"""Owns the way of a quantized weight's codes from a GPU's memory to values in registers, for its Triton kernels.

Shape suffixes: W warps, each with a block of inputs of its own, M outputs of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(
    codes,
    scales,
    zeros,
    mins,
    super_scales,
    super_mins,
    tile,
    step,
    C: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    SUPER_GROUP: tl.constexpr,
    W: tl.constexpr,
):
    """A tile's codes (W, words of a block) of one step, and each chunk's values (W, M), as they are stored."""
    block_W = step * W + tl.arange(0, W)
    is_block_W1 = (block_W < C // BLOCK)[:, None]
    words: tl.constexpr = 16 * BLOCK * BITS // 32
    at_W1 = ((tile * (C // BLOCK) + block_W) * words)[:, None]
    fetched = empty()
    fetched = fetched + (tl.load(codes + at_W1 + tl.arange(0, words)[None, :], mask=is_block_W1, other=0),)
    for chunk in tl.static_range(BLOCK // CHUNK):
        input_W = block_W * BLOCK + chunk * CHUNK
        at_WM = (tile * (C // GROUP) + input_W // GROUP)[:, None] * 16 + tl.arange(0, 16)[None, :]
        fetched = fetched + (tl.load(scales + at_WM, mask=is_block_W1, other=0),)
        if zeros is not None:
            fetched = fetched + (tl.load(zeros + at_WM, mask=is_block_W1, other=0),)
        if mins is not None:
            fetched = fetched + (tl.load(mins + at_WM, mask=is_block_W1, other=0),)
        if super_scales is not None:
            at_WM = (tile * (C // SUPER_GROUP) + input_W // SUPER_GROUP)[:, None] * 16 + tl.arange(0, 16)[None, :]
            fetched = fetched + (tl.load(super_scales + at_WM, mask=is_block_W1, other=0),)
            fetched = fetched + (tl.load(super_mins + at_WM, mask=is_block_W1, other=0),)
    return fetched


@triton.jit
def empty():
    """A tuple to be extended: type checkers take one that is written out for one that stays empty."""
    return ()


@triton.jit
def unscaled_values(
    words,
    places,
    bias,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ZERO: tl.constexpr,
    ON_GPU: tl.constexpr,
    W: tl.constexpr,
    dtype: tl.constexpr,
):
    """What codes stand for before they are scaled: (W, g, thread, part, row, half, input)."""
    if BITS == 8:
        words = tl.reshape(words, (W, 8, 4, BLOCK // 32, 2, 2))
        codes = _four(words << 24 >> 24, words << 16 >> 24, words << 8 >> 24, words >> 24)
        values = codes.to(tl.float32).to(dtype)
    else:
        words = tl.reshape(words, (W, 8, 4, BLOCK // 32, 2))
        if len(places) > 0:
            values = halves(_look_up(words, places, ON_GPU), dtype)
        else:
            codes = _four(words, words >> 4, words >> 8, words >> 12)
            values = halves(codes & 0x000F000F | bias, dtype) - ((128.0 if dtype == tl.bfloat16 else 1024.0) + ZERO)
    return tl.reshape(values, (W, 8, 4, BLOCK // 32, 2, 2, 4))


@triton.jit
def load_table(table):
    """Its 8 words; none without a table."""
    places = empty()
    if table is not None:
        for word in tl.static_range(8):
            places = places + (tl.load(table + word),)
    return places


@triton.jit
def _look_up(words, places, ON_GPU: tl.constexpr):
    """The table's values at the 8 places of each word: 4 pairs, in two new axes.

    Four low or four high bytes are found at once, among those of the first 8 places and of the last 8, by 3 bits of
    each place. The fourth bit chooses between the two.
    """
    low_bits = words & 0x77777777
    fourth_bits = words >> 1 & 0x44444444 | 0x32103210
    pairs = empty()
    for _ in tl.static_range(2):
        low = _permute(
            _permute(places[0], places[1], low_bits, ON_GPU),
            _permute(places[2], places[3], low_bits, ON_GPU),
            fourth_bits,
            ON_GPU,
        )
        high = _permute(
            _permute(places[4], places[5], low_bits, ON_GPU),
            _permute(places[6], places[7], low_bits, ON_GPU),
            fourth_bits,
            ON_GPU,
        )
        pairs = pairs + (_permute(low, high, 0x5140, ON_GPU), _permute(low, high, 0x7362, ON_GPU))
        low_bits = low_bits >> 16
        fourth_bits = fourth_bits >> 16
    return _four(pairs[0], pairs[1], pairs[2], pairs[3])


@triton.jit
def _permute(first, second, selector, ON_GPU: tl.constexpr):
    """Four of the eight bytes of two words, chosen by 4 bits each, of 0 to 7: PTX's prmt, one instruction."""
    selector = tl.to_tensor(selector)
    first = tl.to_tensor(first)
    second = tl.to_tensor(second)
    if ON_GPU:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, selector], tl.int32, True, 1
        )
    else:
        result = selector & 0
        for byte in tl.static_range(4):
            place = selector >> 4 * byte & 7
            result |= (tl.where(place < 4, first, second) >> (place & 3) * 8 & 0xFF) << 8 * byte
        return result


@triton.jit
def halves(words, dtype: tl.constexpr):
    """Both halves of each int32 in a new axis, as numbers of 16 bits."""
    low = (words & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    high = (words >> 16 & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
    return tl.join(low, high)


@triton.jit
def _four(a, b, c, d):
    """a, b, c, d in two new axes of 2."""
    return tl.join(tl.join(a, c), tl.join(b, d))
