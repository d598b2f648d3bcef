"""Times products with quantized weights, as the engine does them: few rows by their codes, many by their values.

Figures of few rows count the bytes of codes and scales, those of many the operations; bf16's are in products.py.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.sweeps.bench import Bench, Calls
from benchmarks.sweeps.products import weight_shapes
from llama2.config import ModelArgs
from llama2.weights.formats import Format, Weight
from llama2.weights.precision import PRECISIONS
from llama2.weights.spec import fitting

# Products, and a weight of the model with the same inputs.
NAMES = {"wqkv": "layers.0.attention.wq", "w13": "layers.0.feed_forward.w1", "w2": "layers.0.feed_forward.w2"}
DECODING, PREFILL = (1, 8, 32), (64, 2048)


def measure(bench: Bench, args: ModelArgs) -> None:
    if bench.dtype.itemsize != 2:
        return
    for precision, largest in PRECISIONS.items():
        for name, weight in NAMES.items():
            shape, format = weight_shapes(args)[name], fitting(largest, weight, args)
            nbytes = sum(part.nbytes for part in _random(format, shape, torch.device("meta")).parts.values())
            for rows in DECODING:
                prepare = partial(_calls, bench, format, shape, rows, nbytes)
                bench.row(f"{name} {precision}, {rows} rows", prepare, nbytes=nbytes)
            for rows in PREFILL:
                prepare = partial(_calls, bench, format, shape, rows, nbytes)
                bench.row(f"{name} {precision}, {rows} rows", prepare, flop=2 * rows * shape[0] * shape[1])


def _calls(bench: Bench, format: Format, shape: tuple[int, int], rows: int, nbytes: int) -> Calls:
    from llama2.kernels import is_hopper
    from llama2.kernels.cuda.kernels import CudaKernels

    kernels = CudaKernels(bench.device, bench.dtype, hopper=is_hopper(bench.device))
    weights = {str(copy): [_random(format, shape, bench.device)] for copy in range(bench.copies(nbytes))}
    with torch.inference_mode(False):
        prepared = kernels.prepare(weights, threads=1)
    x = bench.random(rows, shape[1])
    return [partial(kernels.linear, x, weight) for weight in prepared.values()]


def _random(format: Format, shape: tuple[int, int], device: torch.device) -> Weight:
    """Any codes, and scales that keep results near 1."""
    with torch.inference_mode(False):
        parts = {
            name: torch.full(size, 0.01, dtype=dtype, device=device)
            if dtype.is_floating_point
            else torch.randint(0, 16, size, dtype=dtype, device=device)
            for name, (size, dtype) in format.parts(shape[:1], shape[1:]).items()
        }
    return Weight(format=format, parts=parts)
