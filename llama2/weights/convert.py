"""Owns a conversion: any source of weights to a folder that is complete by itself: DCP, Meta's or Hugging Face's.

Every process of the group calls `convert`; each opens the whole source (which reads nothing), works out the same
shares, and writes its own. An error on one process becomes the same error on all of them.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
import torch.distributed as dist

from llama2.adapters.merge import open_merge
from llama2.config import MODEL_ARGS_FILE
from llama2.progress import Bar, progress
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.calibration import CALIBRATION_FILE, Gptq
from llama2.weights.formats.q4 import Q4
from llama2.weights.hf_writer import HuggingFaceWriter
from llama2.weights.manifest import FileHashes, Manifest
from llama2.weights.origin import SORTED, write_origin
from llama2.weights.precision import Converted, target
from llama2.weights.readers import Chunk
from llama2.weights.readers.dcp import DcpFolder, save_chunks
from llama2.weights.readers.fairscale import (
    PARAMS_FILE,
    check_num_shards,
    fill_shards,
    reserve_shards,
    same_bits,
    write_params,
)
from llama2.weights.readers.hugging_face import open_hugging_face
from llama2.weights.readers.tensor_files import FILE_NAMES
from llama2.weights.source import open_source
from llama2.weights.spec import Spec
from llama2.weights.staging import StagedFolder

logger = logging.getLogger(__name__)

T = TypeVar("T")
OutputFormat = Literal["dcp", "fairscale", "hf"]


def convert(
    original_ckpt_dir: Path | str,
    save_checkpoint_dir: Path | str,
    *,
    tokenizer_path: Path | str | None = None,
    model_parallel_size: int | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    quantize_head: bool = True,
    requantize: bool = False,
    calibration: Path | str | None = None,
    adapter: Path | str | None = None,
    onto: str | None = None,
    output_format: OutputFormat = "dcp",
    output_model_parallel_size: int | None = None,
    overwrite: bool = False,
    verify: bool = False,
) -> None:
    """Convert a checkpoint; a collective if a process group is up, in this process alone if none is.

    Args:
        original_ckpt_dir: what `open_source` opens.
        save_checkpoint_dir: the folder to make. It appears when it is complete, and not before.
        tokenizer_path: `tokenizer.model`, `tokenizer.json`, or their folder; None: in `original_ckpt_dir`.
        model_parallel_size: the number of Meta's shards that must be there; None: as many as there are.
        dtype: of the weights written that are not quantized; None: the source's.
        quantize: see `llama2.weights.precision.target`; None: as the source is.
        quantize_head: the embedding and the head as well, in 8 bits.
        requantize: allow `quantize` for a source that is quantized otherwise, or for what an adapter is added to.
        calibration: a text, or a JSONL file with a "text" in each line, for `quantize="gptq"`.
        adapter: the folder of one to be merged into the weights; those of a quantized source that it changes become
            plain, if `quantize` asks for nothing else.
        onto: see `llama2.adapters.merge.open_merge`.
        output_model_parallel_size: the number of shards to write, for `output_format="fairscale"`.
        overwrite: replace the checkpoint that `save_checkpoint_dir` holds.
        verify: read the result back and compare every weight with its source, bit for bit.

    Raises:
        ValueError: on every process, with the same message, if any of them met an error.
    """
    ranks = _Ranks()
    staged = StagedFolder(save_checkpoint_dir)
    if output_format not in get_args(OutputFormat):
        raise ValueError(f"--output_format must be one of {', '.join(get_args(OutputFormat))}, got {output_format!r}")
    if output_format == "fairscale" and output_model_parallel_size is None:
        raise ValueError("--output_format fairscale needs --output_model_parallel_size, the number of shards to write")
    if output_format != "fairscale" and output_model_parallel_size is not None:
        raise ValueError(
            "--output_model_parallel_size belongs to --output_format fairscale: a folder of "
            f"{output_format} has no shards"
        )
    if output_format != "dcp" and quantize not in (None, "none"):
        raise ValueError(
            f"--output_format {output_format} holds plain values: --quantize must be none, got {quantize!r}"
        )
    if (quantize == "gptq") != (calibration is not None):
        raise ValueError("--quantize gptq and --calibration, the file of a text, go together")
    if calibration is not None and ranks.world_size > 1:
        raise ValueError("--quantize gptq runs in one process, and not under torchrun")
    if onto is not None and adapter is None:
        raise ValueError("--onto says what an adapter is merged into, and there is no --adapter")
    gptq = None if calibration is None else Gptq.open(calibration)

    opened = ranks.agree(
        lambda: open_source(original_ckpt_dir, tokenizer_path=tokenizer_path, num_shards=model_parallel_size)
    )
    if output_format != "dcp":
        quantize, requantize = "none", True
    merge = ranks.agree(lambda: open_merge(adapter, opened, onto=onto, quantize=quantize) if adapter else None)
    stored = opened.reader.spec
    spec = target(
        stored,
        dtype=dtype,
        quantize=quantize,
        quantize_head=quantize_head,
        requantize=requantize,
        merged=merge.pairs if merge else (),
    )
    if isinstance(opened.reader, DcpFolder) and output_format == "dcp" and spec == stored and merge is None:
        raise ValueError(
            f"{opened.reader.path} is a converted checkpoint of that precision already: it loads at every tensor "
            "parallel degree"
        )
    if quantize is None and ranks.rank == 0:
        for note in opened.notes:
            logger.info("%s", note)
    if merge is not None and ranks.rank == 0:
        logger.info("%s", merge.note)
    source = Converted(opened.reader, spec, merge)
    if output_model_parallel_size is not None:
        check_num_shards(spec.args, output_model_parallel_size)

    def open_target() -> None:
        staged.recover()
        _check_target(staged.target, source.path.resolve(), overwrite=overwrite)
        # With the library: its source in bf16, its result, and a copy that it keeps of that.
        staged.open(size=spec.nbytes if gptq is None else 3 * spec.nbytes + _plain(spec).nbytes)

    ranks.agree(open_target, only_first=True)
    try:
        origin = (*opened.origin, *[SORTED] * bool(opened.hidden_orders), *([merge.step] if merge else []))
        ranks.agree(lambda: write_origin(staged.partial, origin), only_first=True)
        ranks.agree(partial(opened.write_tokenizer, staged.partial), only_first=True)
        if gptq is not None:
            source = _calibrate(ranks, gptq, Converted(opened.reader, _plain(spec), merge), spec, staged.partial)
        if output_model_parallel_size is not None:
            _write_shards(ranks, source, staged.partial, num_shards=output_model_parallel_size)
        elif output_format == "hf":
            writer = _write_hugging_face(ranks, source, staged.partial)
            ranks.agree(lambda: writer.write_config(load_tokenizer(staged.partial)), only_first=True)
        else:
            hashes = _write_dcp(ranks, source, staged.partial)
            ranks.agree(Manifest(staged.partial, hashes).write, only_first=True)
        if verify:
            ranks.agree(lambda: _verify(ranks, source, staged.partial))
        ranks.agree(staged.commit, only_first=True)
    except BaseException:
        staged.discard()
        raise
    if ranks.rank == 0:
        logger.info("wrote %s", staged.target)


def _calibrate(ranks: _Ranks, gptq: Gptq, plain: Converted, spec: Spec, folder: Path) -> Converted:
    """The weights as gptqmodel quantizes them, with all else as in `spec`; `folder` has the tokenizer."""
    work = folder / "calibration"
    (work / "plain").mkdir(parents=True)
    _write_hugging_face(ranks, plain, work / "plain").write_config()
    groups = {format.group for format in spec.formats.values() if isinstance(format, Q4)}
    result = ranks.agree(
        lambda: gptq.quantize(
            work,
            load_tokenizer(folder),
            group_size=min(group for group in groups if group),
            layers=spec.args.n_layers,
            context=spec.args.context_length,
        )
    )
    quantized = ranks.agree(lambda: open_hugging_face(result))
    for note in quantized.notes:
        logger.info("%s", note)
    (work / CALIBRATION_FILE).rename(folder / CALIBRATION_FILE)
    # What was opened is mapped, and needs no names.
    shutil.rmtree(work)
    heads = {name: format for name, format in spec.formats.items() if not name.startswith("layers.")}
    return Converted(quantized, replace(spec, formats=heads | dict(quantized.spec.formats)))


def _plain(spec: Spec) -> Spec:
    """What gptqmodel gets."""
    return replace(spec, dtype=torch.bfloat16, formats={})


class _Ranks:
    """The processes that convert together: this one's rank, and how they agree on an error."""

    def __init__(self) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks, on every one of them."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def agree(self, step: Callable[[], T], *, only_first: bool = False) -> T:
        """Run `step` on every process (`only_first`: on rank 0, None elsewhere); raise on all if it failed on one."""
        result, error = None, None
        if self.rank == 0 or not only_first:
            try:
                result = step()
            except (ValueError, OSError) as caught:
                error = caught
        for message in self.gather(_message(error) if error else None):
            if message is not None:
                raise ValueError(message) from error
        return result  # type: ignore[return-value]

    def share(self, items: Iterable[T], nbytes: Callable[[T], int]) -> list[T]:
        """This process's part of `items`, in their order; the parts are all of them, and have about as many bytes."""
        order = list(items)
        loads = [0] * self.world_size
        mine = []
        for index in sorted(range(len(order)), key=lambda index: -nbytes(order[index])):
            least = loads.index(min(loads))
            loads[least] += nbytes(order[index])
            if least == self.rank:
                mine.append(index)
        return [order[index] for index in sorted(mine)]

    def progress(self, what: str, total: int) -> Bar:
        """A bar of bytes, shown by rank 0 for its own share, which stands for all."""
        if self.world_size > 1:
            what += f" (share 1 of {self.world_size})"
        return progress(desc=what, total=total, unit="B", unit_scale=True, disable=self.rank != 0, leave=True)


def _message(error: BaseException) -> str:
    """One line for the user."""
    return " ".join(str(error).split()) or type(error).__name__


def _check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    if target == source or target in source.parents:
        raise ValueError(f"--save_checkpoint_dir {target} must not be or contain --original_ckpt_dir {source}")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise ValueError(f"--save_checkpoint_dir {target} is a file")
    if not any((target / name).exists() for name in (MODEL_ARGS_FILE, PARAMS_FILE, *FILE_NAMES)):
        raise ValueError(f"--save_checkpoint_dir {target} exists and holds no checkpoint: choose another name")
    if not overwrite:
        raise ValueError(f"--save_checkpoint_dir {target} exists; --overwrite replaces it")


def _write_dcp(ranks: _Ranks, source: Converted, folder: Path) -> dict[str, FileHashes]:
    """Returns the hashes of all ranks' files with weights."""
    tensors = source.spec.tensors()

    def nbytes(chunks: Iterable[Chunk]) -> int:
        return sum(math.prod(chunk.shape) * tensors[chunk.name].dtype.itemsize for chunk in chunks)

    chunks = [chunk for share in ranks.agree(lambda: ranks.share(source.shares(), nbytes)) for chunk in share]
    with ranks.progress("converting", nbytes(chunks)) as bar:
        own = ranks.agree(lambda: save_chunks(folder, chunks, tensors=tensors, progress=bar.update))
    ranks.agree(lambda: source.spec.save(folder), only_first=True)
    return {name: hashes for part in ranks.gather(own) for name, hashes in part.items()}


def _write_shards(ranks: _Ranks, source: Converted, folder: Path, *, num_shards: int) -> None:
    args, dtype = source.spec.args, source.spec.dtype
    indices = range(ranks.rank, num_shards, ranks.world_size)
    ranks.agree(lambda: reserve_shards(folder, args, num_shards=num_shards, dtype=dtype, indices=indices))
    _fill(ranks, source, lambda names, read: fill_shards(folder, args, read, num_shards=num_shards, names=names))
    ranks.agree(lambda: write_params(folder, args), only_first=True)


def _write_hugging_face(ranks: _Ranks, source: Converted, folder: Path) -> HuggingFaceWriter:
    def is_tied() -> bool:
        return same_bits(source.read("tok_embeddings.weight"), source.read("output.weight"))

    tied = ranks.gather(ranks.agree(is_tied, only_first=True))[0]
    spec = source.spec
    writer = ranks.agree(lambda: HuggingFaceWriter(folder, spec.args, dtype=spec.dtype, tied=tied))
    ranks.agree(writer.reserve, only_first=True)
    _fill(ranks, source, writer.fill)
    return writer


def _fill(
    ranks: _Ranks, source: Converted, write: Callable[[list[str], Callable[[str], torch.Tensor]], object]
) -> None:
    """Have this process `write` its share of the tensors: their names, and how one is read."""
    tensors = source.spec.tensors()
    names = ranks.share(tensors, lambda name: tensors[name].nbytes)
    with ranks.progress("converting", sum(tensors[name].nbytes for name in names)) as bar:

        def read(name: str) -> torch.Tensor:
            bar.update(tensors[name].nbytes)
            return source.read(name)

        ranks.agree(lambda: write(names, read))


def _verify(ranks: _Ranks, source: Converted, folder: Path) -> None:
    result = open_source(folder).reader
    tensors = source.spec.tensors()
    names = ranks.share(tensors, lambda name: tensors[name].nbytes)
    with ranks.progress("verifying", sum(tensors[name].nbytes for name in names)) as bar:
        for name in names:
            stored = result.read(name)
            for chunk in source.chunks(name):
                part = stored[tuple(slice(at, at + size) for at, size in zip(chunk.offsets, chunk.shape, strict=True))]
                if not same_bits(part, chunk.read().to(part.dtype)):
                    raise ValueError(f"verification failed: {name} differs from its source {source.path}")
            bar.update(tensors[name].nbytes)
