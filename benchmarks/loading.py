"""Measures loading: from a converted folder in the page cache to a model that is ready to run, compared with `cat`.

    python -m benchmarks.loading [--checkpoint DIR | --gigabytes 3] [--rounds 5] [--device cpu] [--out FILE]

Without a checkpoint a synthetic one is converted from 8 shards, the hardest case: two weights of a layer, and the
embedding, are stored in slices of rows. The same command runs under torchrun; the rate is that of all ranks
together. The two take turns. Target: at least `WANTED_RATIO` of the rate of `cat`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks.convert import make_checkpoint
from benchmarks.results import RESULTS, ROOT, save
from benchmarks.tables import table
from llama2.flags import check_amounts, check_counts, run
from llama2.machine.threads import undivided
from llama2.parallel.collectives import connect
from llama2.parallel.plan import build_mesh
from llama2.parallel.process_group import choose_device, init_process_group
from llama2.weights.loader import load_model
from llama2.weights.readers.dcp import DcpFolder

WANTED_RATIO = 0.7
MAX_SEQ_LEN = 2048


def benchmark(
    *,
    checkpoint: str | None = None,
    gigabytes: float = 3.0,
    rounds: int = 5,
    device: str | None = None,
    out: str = str(RESULTS / "loading.json"),
) -> None:
    """Load and `cat` in turns, print the figures, and write them as JSON.

    Args:
        checkpoint: a converted folder; by default one is made.
        gigabytes: size of the one made, in 1e9 bytes.
        rounds: how often each is measured.
        device: cpu or cuda; by default a GPU where each rank has one.
        out: the JSON file to write.
    """
    check_amounts(gigabytes=gigabytes)
    check_counts(rounds=rounds)
    where = choose_device(device)
    init_process_group(where)
    with TemporaryDirectory(prefix="benchmark-loading-") as scratch:
        folder = [checkpoint or str(Path(scratch, "converted"))]
        if checkpoint is None and dist.get_rank() == 0:
            _convert(Path(scratch, "source"), Path(folder[0]), nbytes=int(gigabytes * 1e9))
        dist.broadcast_object_list(folder, src=0)
        loading, reading = [], []
        for _ in range(rounds + 1):
            dist.barrier()
            reading.append(_cat(Path(folder[0])) if dist.get_rank() == 0 else 0.0)
            dist.barrier()
            loading.append(_load(folder[0], where))
        size = sum(file.stat().st_size for file in Path(folder[0]).glob("*.distcp"))
    if dist.get_rank() == 0:
        # The first round warms up the page cache, and memory that the system has given once.
        _report(loading[1:], reading[1:], size=size, ranks=dist.get_world_size(), rounds=rounds, out=out)


def _convert(source: Path, result: Path, *, nbytes: int) -> None:
    make_checkpoint(source, nbytes=nbytes)
    command: list[str | Path] = [sys.executable, ROOT / "convert_checkpoints.py"]
    command += ["--original_ckpt_dir", source, "--save_checkpoint_dir", result]
    # A separate process, whatever group this one belongs to.
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environ)


def _load(folder: str, device: torch.device) -> float:
    """Seconds until every rank is ready."""
    start = time.perf_counter()
    checkpoint = DcpFolder(folder)
    mesh = build_mesh(checkpoint.spec, device.type)
    with undivided() as threads:
        load_model(
            checkpoint,
            mesh,
            connect(device),
            dtype=checkpoint.spec.dtype,
            device=device,
            max_seq_len=MAX_SEQ_LEN,
            threads=threads,
        )
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start


def _cat(folder: Path) -> float:
    files = sorted(str(file) for file in folder.glob("*.distcp"))
    start = time.perf_counter()
    subprocess.run(["cat", *files], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def _report(loading: list[float], reading: list[float], *, size: int, ranks: int, rounds: int, out: str) -> None:
    ratios = [read / load for load, read in zip(loading, reading, strict=True)]
    figures = {
        "bytes": size,
        "load_seconds": loading,
        "cat_seconds": reading,
        "load_gb_per_s": size / 1e9 / statistics.median(loading),
        "cat_gb_per_s": size / 1e9 / statistics.median(reading),
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }
    row = [
        f"{size / 1e9:.2f}",
        f"{figures['load_gb_per_s']:.1f}",
        f"{figures['cat_gb_per_s']:.1f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{WANTED_RATIO:g}",
    ]
    print(table(["GB", "load GB/s", "cat GB/s", "ratio", "our target"], [row]))
    print(f"wrote {save(out, 'loading', {'rounds': rounds, 'ranks': ranks}, figures)}")


if __name__ == "__main__":
    run(benchmark)
