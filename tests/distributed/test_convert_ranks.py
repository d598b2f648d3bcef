"""Every shard count by every process count loads exactly at every degree, and an error reaches every rank."""

import contextlib
import errno
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor import empty as empty_dtensor

from llama2.config import ModelArgs
from llama2.weights.convert import convert
from llama2.weights.readers.fairscale import FairscaleFolder, same_bits, shard_axis
from tests.support.ranks import run_ranks
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

# DCP warns that one process acts alone: intended.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*single process.*")]

DEGREES = (1, 2, 3, 4)
ARGS = tiny_args(dim=96, n_heads=24, n_kv_heads=12, vocab_size=480, n_layers=1, multiple_of=12)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The same weights in 1, 2, 3 and 4 shards, in folders of that name."""
    folder = tmp_path_factory.mktemp("sources")
    weights = random_weights(ARGS, dtype=torch.bfloat16)
    for num_shards in DEGREES:
        meta_folder(folder / str(num_shards), ARGS, weights, num_shards=num_shards)
        tiny_sentencepiece(folder / str(num_shards), vocab_size=480)
    return folder


@pytest.fixture(scope="module")
def converted(sources, tmp_path_factory) -> Path:
    """Folders NxP: N shards converted by P processes."""
    folder = tmp_path_factory.mktemp("converted")
    for processes in DEGREES:
        run_ranks(processes, convert_all, sources, folder)
    return folder


def convert_all(sources: Path, folder: Path) -> None:
    for num_shards in DEGREES:
        target = folder / f"{num_shards}x{dist.get_world_size()}"
        convert(sources / str(num_shards), target, model_parallel_size=num_shards, verify=True)


def load_all(folder: Path) -> dict[str, list[str]]:
    """Load every converted folder at this degree; by folder, the parameters whose shard here is wrong."""
    rank, degree = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (degree,))
    weights = random_weights(ARGS, dtype=torch.bfloat16)
    wrong: dict[str, list[str]] = {}
    for source in sorted(folder.iterdir()):
        args = ModelArgs.load(source)
        state: dict[str, DTensor] = {}
        for name, shape in args.parameter_shapes().items():
            # Vocabulary parallel: the embedding, which Meta's shards split by columns, loads by rows.
            axis = 0 if name == "tok_embeddings.weight" else shard_axis(name)
            placements = [Replicate() if axis is None else Shard(axis)]
            state[name] = empty_dtensor(shape, dtype=torch.bfloat16, device_mesh=mesh, placements=placements)
        dcp.load(state, checkpoint_id=source)
        wrong[source.name] = []
        for name, tensor in state.items():
            whole = weights[name].view(tensor.shape)
            (placement,) = tensor.placements
            expected = whole.chunk(degree, dim=placement.dim)[rank] if isinstance(placement, Shard) else whole
            if not same_bits(tensor.to_local(), expected.contiguous()):
                wrong[source.name].append(name)
    return wrong


@pytest.mark.parametrize("degree", DEGREES)
def test_every_conversion_loads_exactly_at_every_degree(converted, degree):
    results = run_ranks(degree, load_all, converted)
    names = {f"{num_shards}x{processes}" for num_shards in DEGREES for processes in DEGREES}
    assert results == [{name: [] for name in names}] * degree


def convert_back(converted: Path, folder: Path) -> None:
    """N shards -> DCP -> M shards -> DCP, by this many processes."""
    processes = dist.get_world_size()
    for before in DEGREES:
        for after in DEGREES:
            shards, again = folder / f"{before}x{processes}x{after}", folder / f"{before}x{processes}x{after}-dcp"
            source = converted / f"{before}x{processes}"
            convert(source, shards, output_format="fairscale", output_model_parallel_size=after)
            if after == processes:
                convert(shards, again)


@pytest.mark.parametrize("processes", DEGREES)
def test_the_round_trip_to_any_shard_count_is_exact_to_the_bit(sources, converted, tmp_path, processes):
    run_ranks(processes, convert_back, converted, tmp_path)
    for before in DEGREES:
        for after in DEGREES:
            for path in (sources / str(after)).glob("*.pth"):
                original = torch.load(path, weights_only=True)
                result = torch.load(tmp_path / f"{before}x{processes}x{after}" / path.name, weights_only=True)
                assert original.keys() - result.keys() == {"rope.freqs"}
                assert all(same_bits(result[name], original[name]) for name in result)
            FairscaleFolder(tmp_path / f"{before}x{processes}x{after}", vocab_size=480, num_shards=after)
        state = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in ARGS.parameter_shapes().items()}
        dcp.load(state, checkpoint_id=tmp_path / f"{before}x{processes}x{processes}-dcp", no_dist=True)
        weights = random_weights(ARGS, dtype=torch.bfloat16)
        assert all(same_bits(state[name].flatten(), weights[name].flatten()) for name in state)


def shares_and_failures(source: Path, folder: Path) -> list[str]:
    """What this rank sees of a good conversion's files, and of two that fail on rank 1 alone."""
    convert(source, folder / "good")
    seen = [" ".join(str((folder / "good" / f"__{rank}_0.distcp").stat().st_size) for rank in range(3))]

    def full_disk(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def damaged(*args: object, **kwargs: object) -> object:
        raise RuntimeError("bad sector\nand more lines")

    for target, failure in (("os.fsync", full_disk), ("torch.load", damaged)):
        with contextlib.ExitStack() as stack:
            if dist.get_rank() == 1:
                stack.enter_context(mock.patch(target, failure))
            try:
                convert(source, folder / "failed")
            except ValueError as error:
                seen.append(str(error))
    return seen


def test_ranks_share_the_bytes_and_one_ranks_error_is_everybodys(sources, tmp_path):
    seen = run_ranks(3, shares_and_failures, sources / "2", tmp_path)
    assert seen[0] == seen[1] == seen[2]
    sizes, full, damaged = seen[0]
    sizes = [int(size) for size in sizes.split()]
    assert max(sizes) < 1.1 * min(sizes)
    assert "No space left on device" in full
    assert "consolidated.00.pth is not a readable .pth" in damaged
    assert damaged.endswith("bad sector")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
