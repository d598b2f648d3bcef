"""What the converter wrote is what is loaded: damage to any file of the folder is an error that names it."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path

import pytest
import torch

from llama2 import LLM
from llama2.weights import manifest
from llama2.weights.convert import convert
from llama2.weights.manifest import MANIFEST_FILE, FileHashes, Hashing
from llama2.weights.readers.dcp import DcpFolder
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ARGS = tiny_args(vocab_size=480)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = meta_folder(tmp_path_factory.mktemp("source"), ARGS, random_weights(ARGS), num_shards=2)
    tiny_sentencepiece(source, vocab_size=480)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    target = source.parent / "converted"
    convert(source, target)
    return target


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "converted")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_BLOCK", 1000)


def read_all(folder: Path) -> None:
    checkpoint = DcpFolder(folder)
    for name in ARGS.parameter_shapes():
        checkpoint.read(name)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)


FILES = [
    ".metadata",
    "__0_0.distcp",
    MANIFEST_FILE,
    "model_args.json",
    "origin.json",
    "tokenizer.model",
    "tokenizer_config.json",
]


def test_every_file_has_its_hashes(pristine: Path) -> None:
    assert sorted(path.name for path in pristine.iterdir()) == FILES
    read_all(pristine)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_an_error_that_names_the_file(folder: Path, pristine: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    for at in {0, size - 1, *random.Random(0).sample(range(size), 12)}:
        shutil.copy(pristine / name, folder / name)
        flip(folder / name, at)
        with pytest.raises(ValueError, match=rf"{name}.* (is damaged|cannot be read)"):
            read_all(folder)
    if name != "__0_0.distcp":
        return
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        LLM(folder)


@pytest.mark.usefixtures("small_blocks")
def test_the_damaged_block_is_named_wherever_it_is(tmp_path: Path) -> None:
    target = tmp_path / "converted"
    convert(_meta(tmp_path), target)
    data, whole = target / "__0_0.distcp", (target / "__0_0.distcp").read_bytes()
    checkpoint = DcpFolder(target)
    piece = checkpoint._reader.read_metadata().storage_data
    places = [stored.offset + at for stored in list(piece.values())[:4] for at in (0, 70, 900, stored.length - 30)]
    for at in places:
        flip(data, at)
        with pytest.raises(ValueError, match=rf"distcp is damaged: bytes {at // 1000 * 1000} to \d+ are not what was"):
            read_all(target)
        data.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_lost_end_or_a_lost_file_is_an_error_that_names_the_file(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1] if name != MANIFEST_FILE else data[:-3])
    with pytest.raises(ValueError, match=rf"{name}.* (is damaged|cannot be read)"):
        DcpFolder(folder)
    if name not in (MANIFEST_FILE, ".metadata"):
        (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            DcpFolder(folder)


def test_a_wrong_tokenizer_is_named_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    tiny_sentencepiece(tmp_path, vocab_size=512).replace(folder / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is damaged"):
        LLM(folder)


@pytest.mark.usefixtures("small_blocks")
def test_a_rank_compares_the_blocks_of_its_share_alone(tmp_path: Path) -> None:
    target = tmp_path / "again"
    convert(_meta(tmp_path), target)
    checkpoint = DcpFolder(target)
    data = target / "__0_0.distcp"
    place = checkpoint._reader.read_metadata().storage_data
    (output,) = [stored for index, stored in place.items() if index.fqn == "output.weight" and index.offset[0] > 0]
    flip(data, output.offset + output.length // 2)
    DcpFolder(target).read("norm.weight")
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged: bytes \d+000 to \d+000 are not what was written"):
        DcpFolder(target).read("output.weight")


def _meta(folder: Path) -> Path:
    source = meta_folder(folder / "meta", ARGS, random_weights(ARGS), num_shards=2)
    tiny_sentencepiece(source, vocab_size=480)
    return source


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("pieces", [[2500], [1, 999, 1000, 1, 499], [1000, 1000], []])
def test_hashes_do_not_depend_on_how_a_file_is_written(tmp_path: Path, pieces: list[int]) -> None:
    data = random.Random(0).randbytes(sum(pieces))
    (tmp_path / "file").write_bytes(data)
    hashing = Hashing()
    for piece in pieces:
        hashing.update(data[:piece])
        data = data[piece:]
    found = hashing.result()
    assert found == manifest._hash_file(tmp_path / "file")
    assert found.size == sum(pieces)
    assert len(found.blocks) == -(-sum(pieces) // 1000)
    assert isinstance(found, FileHashes)


def test_a_folder_without_hashes_is_loaded_with_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / MANIFEST_FILE).unlink()
    with caplog.at_level(logging.WARNING):
        LLM(folder)
    (warning,) = [record.getMessage() for record in caplog.records if MANIFEST_FILE in record.getMessage()]
    assert str(folder) in warning
    assert "convert it again" in warning


def test_values_are_those_that_were_written(folder: Path) -> None:
    weight = DcpFolder(folder).read("norm.weight")
    assert torch.equal(weight, random_weights(ARGS)["norm.weight"])
