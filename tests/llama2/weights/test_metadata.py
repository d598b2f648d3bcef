"""A converted folder is read, whoever wrote it: nothing in `.metadata` runs, and it is held against the rest."""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from llama2 import LLM
from llama2.config import MODEL_ARGS_FILE
from llama2.weights.readers.dcp import DcpFolder
from llama2.weights.readers.dcp_metadata import read_metadata
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ARGS = tiny_args(vocab_size=512)


class Call:
    """Unpickled by pickle itself, `function(*arguments)` is called."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentencepiece(tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", ARGS, random_weights(ARGS), tokenizer_file)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a program in a pickle would leave behind."""
    return tmp_path / "trace"


def programs(trace: Path) -> dict[str, Any]:
    shell = f"touch {trace}"
    python = f"open({str(trace)!r}, 'w').close()"
    call: Any = Call(os.system, shell)
    inner = pickle.dumps(Call(os.system, shell))
    chunk = ChunkStorageMetadata(offsets=call, sizes=torch.Size([1]))
    tensor = TensorStorageMetadata(properties=TensorProperties(), size=torch.Size([1]), chunks=[chunk])
    return {
        "a shell": Call(os.system, shell),
        "eval": Call(builtins.eval, python),
        "exec": Call(builtins.exec, python),
        "an import": Call(builtins.__import__, "this"),
        "torch's own loader": Call(torch.storage._load_from_bytes, inner),
        "pickle again": Call(pickle.loads, inner),
        "inside the list": Metadata(state_dict_metadata={"norm.weight": tensor}, storage_data={}),
        "as a key": Metadata(state_dict_metadata={}, storage_data={MetadataIndex("x", index=call): 1}),
        "in the state": Metadata(state_dict_metadata={}, planner_data=[[{"a": (Call(os.system, shell),)}]]),
        "a storage's path": Metadata({}, storage_data={MetadataIndex("x"): _StorageInfo(call, 0, 1)}),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", programs(Path()))
def test_no_program_in_it_runs(folder: Path, trace: Path, name: str, protocol: int) -> None:
    pickled = pickle.dumps(programs(trace)[name], protocol=protocol)
    (folder / ".metadata").write_bytes(pickled)
    for read in (LLM, DcpFolder):
        with pytest.raises(ValueError, match=r"\.metadata cannot be read: it names .*, which no list of tensors needs"):
            read(folder)
    assert not trace.exists()


def test_the_programs_are_programs(trace: Path) -> None:
    for name, program in programs(trace).items():
        if name != "an import":
            with_effect = pickle.dumps(program)
            with contextlib.suppress(RuntimeError):  # torch's loader complains, afterwards
                pickle.loads(with_effect)
            assert trace.exists(), name
            trace.unlink()


def global_(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


METADATA = "torch.distributed.checkpoint.metadata"


@pytest.mark.parametrize(
    "operations",
    [
        global_(METADATA, "os.system"),
        global_(METADATA, "Metadata.__init__"),
        global_(METADATA, "torch.load"),
        global_("torch", "load"),
        global_("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
        # An attribute of a class, set for the whole process.
        global_(METADATA, "Metadata") + b"N}" + b"\x8c\x05extrasN" + b"s\x86b",
        # Memory that the file does not have.
        b"N" + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1),
        pickle.BYTEARRAY8 + struct.pack("<Q", 1 << 36),
        pickle.BINBYTES8 + struct.pack("<Q", 1 << 36),
        pickle.LONG4 + struct.pack("<i", 2**31 - 1),
        pickle.PERSID + b"x\n",
        pickle.INST + b"os\nsystem\n",
        pickle.EXT1 + b"\x01",
        b"\x80\x05(((((",
        b"",
        b"junk",
    ],
)
def test_no_operation_reaches_beyond_it(folder: Path, operations: bytes) -> None:
    (folder / ".metadata").write_bytes(b"\x80\x04" + operations + b".")
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"\.metadata cannot be read"):
        DcpFolder(folder)
    assert time.monotonic() - began < 1
    assert not hasattr(Metadata, "extra")


def test_what_dcp_itself_writes_is_read_alike(folder: Path) -> None:
    theirs = dcp.FileSystemReader(folder).read_metadata()
    ours = read_metadata(folder / ".metadata")
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def test_a_flipped_bit_raises_nothing_but_a_value_error(folder: Path) -> None:
    path = folder / ".metadata"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with contextlib.suppress(ValueError):
            read_metadata(path)


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "a/b", "..", "", "model_args.json"])
def test_values_come_from_files_of_the_folder_alone(folder: Path, place: str) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    for stored in metadata.storage_data.values():
        stored.relative_path = place
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="no file of this folder"):
        DcpFolder(folder)


@pytest.mark.parametrize("fault", ["too few", "beyond", "negative", "huge"])
def test_pieces_that_do_not_make_their_tensor_are_refused(folder: Path, fault: str) -> None:
    metadata = dcp.FileSystemReader(folder).read_metadata()
    tensor: Any = metadata.state_dict_metadata["norm.weight"]
    (chunk,) = tensor.chunks
    if fault == "too few":
        tensor.chunks = []
    elif fault == "beyond":
        chunk.offsets = torch.Size([1])
    elif fault == "negative":
        chunk.offsets, chunk.sizes = torch.Size([-1]), torch.Size([65])
    else:
        tensor.size = chunk.sizes = torch.Size([2**62 - 1])
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"are not the whole|goes beyond|0 or more|but the model's is"):
        DcpFolder(folder)


@pytest.mark.parametrize("value", [10**12, 0, -1, 1.5, True, "8", None, 10**30])
@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"])
def test_no_size_takes_memory_or_time_before_it_is_held_against_the_tensors(
    folder: Path, name: str, value: object
) -> None:
    path = folder / MODEL_ARGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"\bmodel_args\.json|\.metadata|but the model's is|the model only") as refused:
        LLM(folder)
    assert time.monotonic() - began < 2
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "null", '{"dim": 1' + "0" * 5000 + "}", "", "{", '{"dim": NaN}'])
def test_a_file_of_sizes_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / MODEL_ARGS_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"model_args\.json is not a model_args\.json"):
        DcpFolder(folder)
