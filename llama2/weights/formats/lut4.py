"""Owns weights in 4 bits whose codes are places in a table: a value is s · table[q], with a scale for each group.

bitsandbytes' NF4 and FP4 are exact in it (arXiv:2305.14314), and so are GGUF's IQ4_NL, IQ4_XS and MXFP4. Scales may be
quantized, too, as in section 3 of that paper; its second level, a table and an offset for 256 scales, is another one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from llama2.weights.formats import Part
from llama2.weights.formats.groups import count, divide, pack, spread, unpack

# The values of the codes 0 to 15.
TABLES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        # Quantiles of the normal distribution, as in appendix E of arXiv:2305.14314, in fp32.
        "nf4": (
            -1.0,
            -0.6961928009986877,
            -0.5250730514526367,
            -0.39491748809814453,
            -0.28444138169288635,
            -0.18477343022823334,
            -0.09105003625154495,
            0.0,
            0.07958029955625534,
            0.16093020141124725,
            0.24611230194568634,
            0.33791524171829224,
            0.44070982933044434,
            0.5626170039176941,
            0.7229568362236023,
            1.0,
        ),
        # A sign, except of 0, two bits of exponent, one of mantissa, over 12 (bitsandbytes, functional.py).
        "fp4": tuple(
            sign * value / 12 or 0.0 for sign in (1, -1) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
        ),
        # kvalues_iq4nl of ggml-common.h.
        "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
        # Twice the values of E2M1 (Open Compute Project, Microscaling Formats 1.0), -0 as 0: kvalues_mxfp4, as above.
        "mxfp4": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lut4:
    """See `llama2.weights.formats.Format`. `table` is one of `TABLES`.

    Double quantization: `scales` of uint8 are to be multiplied by fp32 `output_scales`, one for each output.
    """

    table: str
    group: int = 64
    scales: torch.dtype = torch.float32

    @property
    def unit(self) -> int:
        return self.group

    @property
    def is_double(self) -> bool:
        return self.scales == torch.uint8

    def parts(self, outputs: tuple[int, ...], inputs: tuple[int, ...]) -> dict[str, Part]:
        *outer, last = inputs
        parts = {
            "codes": Part((*outputs, *outer, count(last, 2)), torch.uint8),
            "scales": Part((*outputs, *outer, count(last, self.group)), self.scales),
        }
        return parts | ({"output_scales": Part(outputs, torch.float32)} if self.is_double else {})

    def dequantize(self, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        codes = unpack(parts["codes"])
        table = self._values(codes.device)
        scales = parts["scales"].float()
        if self.is_double:
            scales = scales * spread(parts["output_scales"], scales.shape[1])
        return table[codes.int()] * spread(scales, codes.shape[1])

    def quantize(self, values_FC: torch.Tensor) -> dict[str, torch.Tensor]:
        """The nearest values of the table, whose largest is the group's; with double quantization, nearly.

        To the bit as bitsandbytes does it, but for the second level: values are multiplied by the scale's reciprocal.
        """
        table = self._values(values_FC.device)
        groups_FGI = values_FC.float().unflatten(1, (-1, self.group))
        scales_FG = groups_FGI.abs().amax(-1)
        if self.is_double:
            output_scales_F = scales_FG.amax(-1) / 255
            # At 0 a group would vanish.
            levels_FG = divide(scales_FG, output_scales_F).round().clamp(1, 255)
            scales_FG = levels_FG * output_scales_F[:, None]
            scales = {"scales": levels_FG.to(torch.uint8), "output_scales": output_scales_F}
        else:
            scales = {"scales": scales_FG.to(self.scales)}
        borders = (table[1:] + table[:-1]) / 2
        codes = torch.bucketize(groups_FGI * (1 / scales_FG.clamp(min=1e-38))[..., None], borders)
        return {"codes": pack(codes.flatten(1)), **scales}

    def _values(self, device: torch.device) -> torch.Tensor:
        """The table (16,), made on the device: a copy from the host could not be recorded in a CUDA graph."""
        return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in TABLES[self.table]])
