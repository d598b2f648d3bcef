"""Measures other engines on a GPU in turns with ours, without a flag parser to install: see benchmarks/offline.py.

python -m benchmarks.gpu_peers --peers transformers_static,gpt_fast
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch.distributed as dist

from benchmarks.gpu_report import GpuReport
from benchmarks.offline import benchmark
from benchmarks.results import RESULTS
from benchmarks.shapes import SHAPES
from llama2.dtypes import read_dtype
from llama2.flags import argument


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    path = settings.out / "peers.json"
    try:
        benchmark(
            shape=settings.shape,
            batches=1,
            contexts=settings.context,
            rounds=settings.rounds,
            peer=settings.peers,
            dtype=settings.dtype,
            device=settings.device,
            out=str(path),
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    content = json.loads(path.read_text(encoding="utf-8"))
    GpuReport(settings.out).put("peers", content["settings"], content["figures"]["peers"])


def parser() -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(prog="python -m benchmarks.gpu_peers", description=(__doc__ or "").split("\n")[0])
    known.add_argument("--shape", choices=SHAPES, default="7b")
    known.add_argument("--peers", default="transformers_static,gpt_fast", help="several with commas")
    known.add_argument("--context", type=int, default=128, help="tokens of the prompt, which is one")
    known.add_argument("--rounds", type=int, default=2)
    known.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    known.add_argument("--dtype", type=argument(read_dtype), default="bfloat16")
    known.add_argument("--out", type=Path, default=RESULTS / "gpu", help="the folder of gpu.json")
    return known


if __name__ == "__main__":
    main()
    dist.destroy_process_group()
