"""Owns the converter's command line (`convert_checkpoints.py`, `llama2-convert`): its flags, its processes, its end.

Any number of processes under torchrun converts any number of shards, and so does one without it. Knows no file format.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import fire
import torch
import torch.distributed as dist

from llama2.dtypes import read_dtype
from llama2.flags import check_flags
from llama2.parallel.torchrun import exit_with
from llama2.weights.capacity import Devices, count_capacity
from llama2.weights.capacity_report import report
from llama2.weights.convert import convert
from llama2.weights.kinds import check_source
from llama2.weights.source import open_source


def options(
    *,
    original_ckpt_dir: str | None = None,
    save_checkpoint_dir: str | None = None,
    tokenizer_path: str | None = None,
    model_parallel_size: int | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    quantize_head: bool = True,
    requantize: bool = False,
    calibration: str | None = None,
    adapter: str | None = None,
    onto: str | None = None,
    output_format: str = "dcp",
    output_model_parallel_size: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    plan: str | None = None,
    gpus: str | None = None,
) -> dict[str, Any]:
    """Convert a Llama checkpoint to one folder that loads at every tensor parallel degree, or back.

    Args:
        original_ckpt_dir: Meta's folder (params.json, consolidated.00.pth ...), Hugging Face's (config.json,
            model.safetensors ...), or a .safetensors or .gguf file; to convert back, a converted folder.
        save_checkpoint_dir: the folder to make. It appears when it is complete.
        tokenizer_path: tokenizer.model or tokenizer.json; by default the one in original_ckpt_dir.
        model_parallel_size: how many consolidated.NN.pth there must be; by default as many as there are.
        dtype: bfloat16 (bf16), float16 (fp16) or float32 (fp32); by default the source's.
        quantize: int8, int4, nf4, nf4_double or gptq for the weights of all linear layers, none for values in dtype; by
            default as the source is. gptq needs calibration, and gptqmodel, which make gptq installs.
        quantize_head: with it the embedding and the head get int8; --quantize_head=False leaves them in dtype.
        requantize: allow quantize where the source is quantized otherwise, or an adapter is merged into it: errors add
            up.
        calibration: with quantize gptq, a text such as the model will meet, or a JSONL file with a "text" in each line.
        adapter: the folder of an adapter (LoRA, in PEFT's format) to merge into the weights. What it changes of a
            quantized source becomes plain, if quantize asks for nothing else.
        onto: original, to merge it into the values of a source that is not quantized; quantized, into the values of one
            that is, or into what quantize makes of one that is not; by default into the values as the source has them.
        output_format: dcp, fairscale for Meta's layout, or hf for Hugging Face's.
        output_model_parallel_size: how many consolidated.NN.pth to write, with output_format fairscale.
        overwrite: replace the checkpoint that save_checkpoint_dir holds, once the new one is complete.
        verify: read the result back and compare every weight with its source.
        max_seq_len: accepted for the sake of TorchServe's example; a conversion does not depend on it.
        max_batch_size: the same.
        plan: convert nothing, but say what fits of the model in this folder or file: its bytes at each precision and
            degree, tokens beside them, and what to choose. Goes with gpus and tokenizer_path alone.
        gpus: for which GPUs, such as 2x24GiB, 80GB or 8x80GiB; by default those of this machine, else its CPU.
    """
    if plan is not None:
        if isinstance(plan, bool):
            raise ValueError("--plan needs a folder or a file")
        return {"plan": str(plan), "gpus": gpus, "tokenizer_path": tokenizer_path}
    if gpus is not None:
        raise ValueError("--gpus belongs to --plan")
    if original_ckpt_dir is None or save_checkpoint_dir is None:
        raise ValueError("--original_ckpt_dir and --save_checkpoint_dir are needed, or --plan")
    for name, number in (
        ("model_parallel_size", model_parallel_size),
        ("output_model_parallel_size", output_model_parallel_size),
    ):
        if number is not None and (type(number) is not int or number < 1):
            raise ValueError(f"--{name} must be a positive integer, got {number!r}")
    switches = {"overwrite": overwrite, "verify": verify, "quantize_head": quantize_head, "requantize": requantize}
    for name, switch in switches.items():
        if not isinstance(switch, bool):
            raise ValueError(f"--{name} is a switch and takes no value, got {switch!r}")
    if isinstance(calibration, bool):
        raise ValueError("--calibration needs a file")
    if isinstance(adapter, bool):
        raise ValueError("--adapter needs a folder")
    dtype_name = read_dtype(dtype, "--dtype")
    return {
        # str: fire reads a folder named 7 as a number.
        "original_ckpt_dir": str(original_ckpt_dir),
        "save_checkpoint_dir": str(save_checkpoint_dir),
        "tokenizer_path": None if tokenizer_path is None else str(tokenizer_path),
        "model_parallel_size": model_parallel_size,
        "dtype": getattr(torch, dtype_name) if dtype_name else None,
        # str: fire reads None as no value at all.
        "quantize": None if quantize is None else str(quantize).lower(),
        "quantize_head": quantize_head,
        "requantize": requantize,
        "calibration": None if calibration is None else str(calibration),
        "adapter": None if adapter is None else str(adapter),
        "onto": None if onto is None else str(onto),
        "output_format": output_format,
        "output_model_parallel_size": output_model_parallel_size,
        "overwrite": overwrite,
        "verify": verify,
    }


def main() -> None:
    """Exit with 0, with 1 after one line for an error of any process, or with 2 after fire's usage."""
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    status = 0
    with _process_group():
        # Not earlier: a process that waits for its group is in C++, where only the default handler works.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        try:
            check_flags(sys.argv[1:], options)
            with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
                # Alone, since fire describes the result instead where --help follows other flags.
                command = ["--help"] if "--help" in sys.argv else sys.argv[1:]
                arguments = fire.Fire(options, command, name=Path(sys.argv[0]).name, serialize=lambda _: None)
            if "plan" not in arguments:
                convert(**arguments)
            elif first:
                _check_alone(sys.argv[1:])
                print(_plan(**arguments))
        except ValueError as error:
            status = 1
            if first:
                print(f"error: {error}", file=sys.stderr)
        except fire.core.FireExit as usage:
            status = usage.code
    exit_with(status)


def _check_alone(words: Sequence[str]) -> None:
    """Raises ValueError for a flag that says nothing beside --plan."""
    for word in words:
        name = word[2:].split("=")[0].replace("-", "_")
        if word.startswith("--") and name not in ("plan", "gpus", "tokenizer_path"):
            raise ValueError(f"--{name} belongs to a conversion: --plan takes --gpus and --tokenizer_path alone")


def _plan(*, plan: str, gpus: str | None, tokenizer_path: str | None) -> str:
    devices = Devices.of_this_machine() if gpus is None else Devices.read(str(gpus))
    check_source(Path(plan), "--plan")
    source = open_source(plan, tokenizer_path=None if tokenizer_path is None else str(tokenizer_path))
    return report(count_capacity(source.reader.spec, devices), plan, source.notes)


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """The group that torchrun asks for, if any. None leaves before all are done: torchrun would stop the others."""
    if "RANK" not in os.environ:
        yield
        return
    # A process that dies ends every collective at once; this only bounds how much slower than another one may be.
    dist.init_process_group("gloo", timeout=timedelta(hours=1))
    yield
    dist.barrier()
    dist.destroy_process_group()


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that what was written is removed; once, since torchrun and a terminal both send the signal."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
