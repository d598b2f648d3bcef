"""Measures the converter against `cp -r` of the same bytes: rate, and the most anonymous memory of any process.

    python -m benchmarks.convert [--gigabytes 4] [--processes 1] [--rounds 3] [--folder DIR] [--out FILE]

The checkpoint is synthetic: Llama's architecture at Meta's model parallel size 8, in bf16. Both start with the
source in the page cache and no pending writes, take turns, and end when all that they wrote is on disk.
The fastest of the rounds counts for each: other load on the machine disturbs it least. `start_seconds` is what the same
command takes for a checkpoint of nothing: interpreters, imports, and torchrun's own.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import tokenizers
import torch

from benchmarks.results import RESULTS, ROOT, save
from benchmarks.tables import table
from llama2.config import ModelArgs
from llama2.flags import check_amounts, check_counts, run
from llama2.weights.readers.fairscale import write_fairscale

NUM_SHARDS = 8
DTYPE = torch.bfloat16
IDLE = "import torch, torch.distributed.checkpoint, time; print(flush=True); time.sleep(60)"


def benchmark(
    *,
    gigabytes: float = 4.0,
    processes: int = 1,
    rounds: int = 3,
    folder: str | None = None,
    out: str = str(RESULTS / "convert.json"),
) -> None:
    """Make a checkpoint, copy and convert it in turns, print the figures, and write them as JSON.

    Args:
        gigabytes: size of the checkpoint, in 1e9 bytes.
        processes: 1 runs plain python, more run under torchrun.
        rounds: how often each is measured.
        folder: where to write, with room for twice the size; by default the system's temporary folder.
        out: the JSON file to write.
    """
    check_amounts(gigabytes=gigabytes)
    check_counts(processes=processes, rounds=rounds)
    with TemporaryDirectory(dir=folder, prefix="benchmark-convert-") as scratch:
        source, result = Path(scratch, "source"), Path(scratch, "result")
        args = make_checkpoint(source, nbytes=int(gigabytes * 1e9))
        tiny = Path(scratch, "tiny")
        make_checkpoint(tiny, nbytes=0)
        copying, converting, starting, memory = [], [], [], []
        for _ in range(rounds):
            copying.append(_timed(["cp", "-r", source, result], result)[0])
            starting.append(_timed(_command(tiny, result, processes), result)[0])
            seconds, anonymous = _timed(_command(source, result, processes), result)
            converting.append(seconds)
            memory.append(anonymous)
        size = sum(file.stat().st_size for file in source.iterdir())
    seconds, copy = min(converting), min(copying)
    after_start = seconds - min(starting)
    largest = max(math.prod(shape) for shape in args.parameter_shapes().values()) * DTYPE.itemsize
    interpreter = _idle_memory()
    figures = {
        "bytes": size,
        "convert_seconds": converting,
        "start_seconds": starting,
        "cp_seconds": copying,
        "convert_gb_per_s": size / 1e9 / seconds,
        "cp_gb_per_s": size / 1e9 / copy,
        "ratio": copy / seconds,
        # Nothing is left of a small checkpoint's time.
        "ratio_after_start": copy / after_start if after_start > 0 else None,
        "anonymous_bytes": max(memory),
        "interpreter_bytes": interpreter,
        "largest_tensor_bytes": largest,
        "anonymous_above_interpreter_in_largest_tensors": (max(memory) - interpreter) / largest,
    }
    print(_as_text(figures))
    print(f"wrote {save(out, 'convert', {'gigabytes': gigabytes, 'processes': processes, 'rounds': rounds}, figures)}")


def _as_text(figures: Mapping[str, Any]) -> str:
    ratio = figures["ratio_after_start"]
    row = [
        f"{figures['bytes'] / 1e9:.2f}",
        f"{figures['convert_gb_per_s']:.2f}",
        f"{figures['cp_gb_per_s']:.2f}",
        f"{figures['ratio']:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
        *(f"{figures[f'{name}_bytes'] / 1e6:.0f}" for name in ("anonymous", "interpreter", "largest_tensor")),
    ]
    header = ["GB", "convert GB/s", "cp GB/s", "ratio", "after start", "memory MB", "idle MB", "largest tensor MB"]
    return table(header, [row])


def make_checkpoint(folder: Path, *, nbytes: int) -> ModelArgs:
    """Write a Llama of about `nbytes`, narrow enough to have some layers, and a tokenizer."""
    for dim in (8192, 4096, 2048, 1024, 512):
        params = {"dim": dim, "n_layers": 1, "n_heads": dim // 64, "vocab_size": 32000}
        shapes = ModelArgs.from_params(params).parameter_shapes()
        sizes = {name: math.prod(shape) * DTYPE.itemsize for name, shape in shapes.items()}
        layer = sum(size for name, size in sizes.items() if name.startswith("layers."))
        layers = round((nbytes - sum(sizes.values()) + layer) / layer)
        if layers >= 4:
            break
    args = ModelArgs.from_params({**params, "n_layers": max(layers, 1)})
    # The same noise in every parameter: no step of a conversion depends on the values.
    noise = torch.randn(max(sizes.values()) // DTYPE.itemsize, dtype=DTYPE)
    shapes = args.parameter_shapes()
    write_fairscale(
        folder,
        args,
        lambda name: noise[: math.prod(shapes[name])].view(shapes[name]),
        num_shards=NUM_SHARDS,
        dtype=DTYPE,
    )
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return args


def _command(source: Path, result: Path, processes: int) -> list[str | Path]:
    torchrun: list[str | Path] = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc_per_node", str(processes)]
    options: list[str | Path] = ["--original_ckpt_dir", source, "--save_checkpoint_dir", result]
    return [sys.executable, *(torchrun if processes > 1 else []), ROOT / "convert_checkpoints.py", *options]


def _timed(command: Sequence[str | Path], result: Path) -> tuple[float, int]:
    """Seconds until the command's output is on the disk, and the most anonymous memory of one of its processes."""
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watch = _MemoryWatch(process)
    errors = process.communicate()[1]
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    peak = watch.stop()
    if process.returncode:
        raise SystemExit(errors)
    shutil.rmtree(result)
    return seconds, peak


class _MemoryWatch(threading.Thread):
    """Samples the anonymous memory of a process and its descendants, and keeps the largest of any of them."""

    def __init__(self, process: psutil.Process, *, interval: float = 0.02) -> None:
        super().__init__(daemon=True)
        self._process = process
        self._interval = interval
        self._done = threading.Event()
        self._peak = 0
        self.start()

    def run(self) -> None:
        while not self._done.wait(self._interval):
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            self._peak = max([self._peak, *(_anonymous(process.pid) for process in family)])

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self._peak


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(kilobytes[0]) * 1024 if kilobytes else 0


def _idle_memory() -> int:
    """Anonymous memory of an idle interpreter that has imported torch and DCP."""
    with subprocess.Popen([sys.executable, "-c", IDLE], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory = _anonymous(process.pid)
        process.kill()
    return memory


if __name__ == "__main__":
    run(benchmark)
