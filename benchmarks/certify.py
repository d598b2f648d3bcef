"""Measures what the precision of a checkpoint's weights costs, against a reference, and certifies it in its folder.

    python -m benchmarks.certify --checkpoint llama-7b-int4 --reference llama-7b --text book.txt
    torchrun --nproc_per_node 2 -m benchmarks.certify --checkpoint llama-7b-int4 --reference llama-7b --text book.txt

Both are given the same windows of the text, on the engine that serves them, and their logits are compared at every
token that counts (`benchmarks.divergence`); then both continue some windows' beginnings greedily. `certificate.json`
has an entry for each configuration: another device or another number of ranks adds one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.divergence import Divergence
from benchmarks.results import commit, machine, sources
from benchmarks.tables import table
from llama2 import LLM
from llama2.config import EngineConfig, ModelArgs
from llama2.dtypes import read_dtype
from llama2.flags import check_counts, run, several
from llama2.kernels import choose_kernels
from llama2.parallel.process_group import choose_device
from llama2.progress import progress
from llama2.text.tokenizer import Tokenizer, load_tokenizer
from llama2.weights.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    Figures,
    Identity,
    Measurement,
    Reference,
    Text,
    read_certificate,
    write_certificate,
)
from llama2.weights.origin import describe, read_origin
from llama2.weights.readers.dcp import DcpFolder

logger = logging.getLogger(__name__)

# Fewer say little of how much they differ from one another, which the standard error is made of.
LEAST_WINDOWS = 8
GREEDY_PROMPTS = 32
GREEDY_TOKENS = 128
ENGINE = EngineConfig()


def certify(
    *,
    checkpoint: str | Sequence[str],
    reference: str,
    text: str,
    tokens: int = 16384,
    context: int = 1024,
    stride: int = 512,
    dtype: str = "bf16",
    activation_dtype: str = ENGINE.activation_dtype,
    kv_cache_dtype: str = ENGINE.kv_cache_dtype,
    device: str | None = None,
) -> None:
    """Compare converted folders with another over a text, print figures, and write a certificate.json into each.

    Args:
        checkpoint: the folder to certify; several with commas.
        reference: what it is compared with, usually the same weights before they were quantized.
        text: a file in UTF-8 that both models are given, of the kind that will be served.
        tokens: how many of its tokens count, at most.
        context: tokens of a window.
        stride: windows begin so many tokens apart, and so many count at the end of each.
        dtype: bfloat16 (bf16), float16 (fp16) or float32 (fp32); of activations, and of the reference's KV cache.
        activation_dtype: int8 rounds what the checkpoint's quantized weights are multiplied by, as it may be served.
        kv_cache_dtype: int8 or fp8 for the checkpoint's keys and values, as it may be served.
        device: cpu or cuda; by default a GPU where each rank has one.
    """
    check_counts(tokens=tokens, context=context, stride=stride)
    # str: fire reads a folder named 7 as a number.
    folders, other = [Path(str(one)) for one in several(checkpoint)], Path(str(reference))
    dtype = read_dtype(dtype, "--dtype") or "bfloat16"
    for folder in folders:
        check_alike(folder, other)
    windows = Windows.of(Path(str(text)), load_tokenizer(other), tokens=tokens, context=context, stride=stride)
    EngineConfig(activation_dtype=activation_dtype, kv_cache_dtype=kv_cache_dtype)  # refuses what is none
    served = {"activation_dtype": activation_dtype, "kv_cache_dtype": kv_cache_dtype}
    where = choose_device(device)
    reference_model = _Model(folder=other, dtype=dtype)
    floor = None
    if dtype != "float32":
        floor = _compare(windows, reference_model, _Model(folder=other, dtype="float32"), where)
    for folder in folders:
        figures = _compare(windows, _Model(folder=folder, dtype=dtype, options=served), reference_model, where)
        if figures is None:
            continue
        measured = Measurement(
            **_configuration(where, dtype, **served),
            torch=torch.__version__,
            commit=commit(),
            sources=sources(),
            figures=figures,
            noise_floor=floor,
        )
        print(folder)
        _print(measured)
        _write(folder, other, windows.text, measured)
        print(f"wrote {folder / CERTIFICATE_FILE}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """A text as both models get it: `prompts` of `text.context` ids each, with BOS where the model wants it."""

    text: Text
    prompts: Sequence[list[int]]

    @classmethod
    def of(cls, file: Path, tokenizer: Tokenizer, *, tokens: int, context: int, stride: int) -> Windows:
        """Raises ValueError if the text cannot be read, or is too short, or the sizes make no sense."""
        try:
            data = file.read_bytes()
            ids = tokenizer.encode(data.decode())
        except OSError as error:
            raise ValueError(f"--text {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {file} is not in UTF-8: byte {error.start}") from None
        bos = tokenizer.encode_prompt("")
        span = context - len(bos)
        if not stride < span:
            raise ValueError(f"--stride must be less than the {span} tokens of text in a window, got {stride}")
        if tokens < LEAST_WINDOWS * stride:
            raise ValueError(
                f"--tokens must be at least {LEAST_WINDOWS * stride}, for {LEAST_WINDOWS} windows of {stride} tokens "
                f"that count, got {tokens}"
            )
        needed = span + (LEAST_WINDOWS - 1) * stride
        if len(ids) < needed:
            raise ValueError(
                f"--text {file} has {len(ids)} tokens, and {LEAST_WINDOWS} windows need {needed}: give a longer one, "
                "or a smaller --context or --stride"
            )
        count = min((len(ids) - span) // stride + 1, tokens // stride)
        starts = range(0, count * stride, stride)
        described = Text(name=file.name, sha256=hashlib.sha256(data).hexdigest(), context=context, stride=stride)
        return cls(text=described, prompts=[bos + ids[start : start + span] for start in starts])

    def openings(self) -> Iterator[list[int]]:
        """Some prompts to continue greedily, spread over the text, which leave room for a reply."""
        length = min(GREEDY_TOKENS, self.text.context // 2)
        step = -(-len(self.prompts) // GREEDY_PROMPTS)
        return (prompt[:length] for prompt in self.prompts[::step])


def check_alike(folder: Path, other: Path) -> None:
    """Raises ValueError if the two are not of one architecture with one tokenizer."""
    own, theirs = DcpFolder(folder).spec.args, DcpFolder(other).spec.args
    for one in fields(ModelArgs):
        mine, its = getattr(own, one.name), getattr(theirs, one.name)
        if mine != its:
            raise ValueError(
                f"--checkpoint and --reference must be of one architecture, but {one.name} is {mine} in {folder} "
                f"and {its} in {other}"
            )
    tokenizer, another = load_tokenizer(folder), load_tokenizer(other)
    ids = range(tokenizer.vocab_size)
    same = (
        tokenizer.vocab_size == another.vocab_size
        and tokenizer.special_tokens == another.special_tokens
        and tokenizer.encode_prompt("") == another.encode_prompt("")
        and all(tokenizer.token_bytes(one) == another.token_bytes(one) for one in ids)
    )
    if not same:
        raise ValueError(f"--checkpoint {folder} and --reference {other} must have the same tokenizer")
    # Both are about to be measured for a while: what a certificate needs is asked for now.
    Identity.of(folder), Identity.of(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """A folder as it is run: `options` are the engine's."""

    folder: Path
    dtype: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _compare(windows: Windows, checkpoint: _Model, reference: _Model, device: torch.device) -> Figures | None:
    """One model against another. Called on every rank; None on all but rank 0."""
    stride = windows.text.stride
    openings = list(windows.openings())
    room = min(GREEDY_TOKENS, windows.text.context - len(openings[0]))
    found = Divergence()
    with ExitStack() as models:
        # Both are in memory at once, and neither needs a large cache.
        own, theirs = (
            models.enter_context(
                LLM(
                    one.folder,
                    dtype=one.dtype,
                    device=device,
                    max_seq_len=windows.text.context,
                    max_batch_size=8,
                    kv_memory_fraction=0.25,
                    cuda_graphs=False,
                    **one.options,
                )
            )
            for one in (checkpoint, reference)
        )
        first = dist.get_rank() == 0
        for prompt in progress(windows.prompts, desc="scoring", unit="window", disable=not first):
            # The logits after a token are of the next one.
            own_TV, theirs_TV = (one.score(prompt, use_tqdm=False)[-stride - 1 : -1] for one in (own, theirs))
            if first:
                found.add(own_TV, theirs_TV, torch.tensor(prompt[-stride:]))
        own_ids, theirs_ids = (
            [reply.token_ids for reply in one.generate(openings, temperature=0, max_new_tokens=room, ignore_eos=True)]
            for one in (own, theirs)
        )
    return found.figures(list(zip(own_ids, theirs_ids, strict=True))) if first else None


def _configuration(device: torch.device, dtype: str, *, activation_dtype: str, kv_cache_dtype: str) -> dict[str, Any]:
    there = machine()
    bits = 8 if activation_dtype == "int8" else 32 if dtype == "float32" else 16
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{there['cpu']} (family {there['cpu_family']}, model {there['cpu_model']})",
        "kernel": f"A{bits}",
        "implementation": type(choose_kernels(device, getattr(torch, dtype))).__name__,
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "tensor_parallel_size": dist.get_world_size(),
    }


def _write(folder: Path, other: Path, text: Text, measured: Measurement) -> None:
    own, theirs = Identity.of(folder), Identity.of(other)
    spec, origin = DcpFolder(other).spec, read_origin(other)
    certificate = Certificate(
        weights=own.weights,
        tokenizer=own.tokenizer,
        stored=dict(DcpFolder(folder).spec.stored()),
        reference=Reference(
            weights=theirs.weights,
            stored=dict(spec.stored()),
            origin=tuple(map(dict, origin)),
            note=describe(origin),
        ),
        text=text,
        measurements=(measured,),
    )
    try:
        earlier = read_certificate(folder)
    except ValueError as error:
        logger.warning("the former certificate is replaced: %s", error)
        earlier = None
    joined = certificate.joined(earlier) if earlier else certificate
    if joined is None:
        logger.warning("the former certificate, about another reference or text, is replaced")
    write_certificate(folder, joined or certificate)


def _print(measured: Measurement) -> None:
    columns = {"checkpoint": measured.figures, "noise floor": measured.noise_floor}
    shown = {title: one for title, one in columns.items() if one is not None}
    rows = [[each.name, *(f"{getattr(one, each.name):.6g}" for one in shown.values())] for each in fields(Figures)]
    print(table(["", *shown], rows))


if __name__ == "__main__":
    run(certify)
    if dist.is_initialized():
        dist.destroy_process_group()
