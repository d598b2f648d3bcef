"""A certificate speaks of the weights beside it, is read back as it was written, and is refused in any other case."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2.weights import manifest
from llama2.weights.certificate import CERTIFICATE_FILE, read_certificate, write_certificate
from llama2.weights.convert import convert
from llama2.weights.manifest import MANIFEST_FILE
from llama2.weights.readers.dcp import DcpFolder
from tests.support.certificates import FIGURES, MEASUREMENT, certificate_of
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ARGS = tiny_args(vocab_size=480)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certified")
    source = meta_folder(folder / "source", ARGS, random_weights(ARGS), num_shards=1)
    tiny_sentencepiece(source, vocab_size=480)
    convert(source, folder / "converted")
    return folder / "converted"


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """With a certificate."""
    folder = shutil.copytree(pristine, tmp_path / "converted")
    write_certificate(folder, certificate_of(folder))
    return folder


def test_what_was_written_is_read_back(folder: Path) -> None:
    assert read_certificate(folder) == certificate_of(folder)
    write_certificate(folder, replace(certificate_of(folder), stored={"q8": 1}))
    assert read_certificate(folder) == replace(certificate_of(folder), stored={"q8": 1})


def test_the_manifest_has_its_hash_and_keeps_all_others(folder: Path, pristine: Path) -> None:
    before, after = (json.loads((one / MANIFEST_FILE).read_text())["files"] for one in (pristine, folder))
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {CERTIFICATE_FILE}
    DcpFolder(folder)
    path = folder / CERTIFICATE_FILE
    path.write_bytes(path.read_bytes().replace(b"0.125", b"0.025"))
    for read in (DcpFolder, read_certificate):
        with pytest.raises(ValueError, match=r"certificate.json is damaged: it is not what was written"):
            read(folder)


def test_a_folder_without_one_has_none(pristine: Path) -> None:
    assert read_certificate(pristine) is None


def test_one_beside_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "source", ARGS, random_weights(ARGS, seed=1), num_shards=1)
    tiny_sentencepiece(source, vocab_size=480)
    convert(source, tmp_path / "others")
    with pytest.raises(ValueError, match=r"certificate.json is not about the weights in .*others: remove it, or"):
        read_certificate(folder, weights=tmp_path / "others")
    shutil.copy(folder / CERTIFICATE_FILE, tmp_path / "others")
    with pytest.raises(ValueError, match=r"certificate.json is not about the weights in .*others: remove it, or"):
        read_certificate(tmp_path / "others")


def test_one_beside_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "source", ARGS, random_weights(ARGS), num_shards=1)
    tiny_sentencepiece(source, vocab_size=480)
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    convert(source, tmp_path / "others")
    with pytest.raises(ValueError, match=r"certificate.json is not about the tokenizer in .*others: remove it, or"):
        read_certificate(folder, weights=tmp_path / "others")


def test_a_folder_without_hashes_cannot_have_one(folder: Path) -> None:
    (folder / MANIFEST_FILE).unlink()
    with pytest.raises(ValueError, match=r"has no manifest.json, so no certificate can be about it: convert it again"):
        read_certificate(folder)


def broken(content: dict[str, Any], path: str, value: Any) -> str:
    *way, last = path.split(".")
    part: Any = content
    for key in way:
        part = part[int(key)] if isinstance(part, list) else part[key]
    if value is None:
        del part[last]
    else:
        part[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("weights", None, "weights: Field required"),
        ("weights", 7, "weights: Input should be a valid string"),
        ("text.stride", "512", "text.stride: Input should be a valid integer"),
        ("measurements.0.figures.kl_mean", None, "measurements.0.figures.kl_mean: Field required"),
        ("measurements.0.figures.kl_mean", float("nan"), "measurements.0.figures.kl_mean: .*finite"),
        ("measurements.0.figures.more", 1, "measurements.0.figures.more: Unexpected"),
        ("reference.origin", {}, "reference.origin: Input should be a valid"),
    ],
)
def test_a_broken_one_is_refused_in_a_sentence_that_names_the_field(
    folder: Path, tmp_path: Path, path: str, value: Any, message: str
) -> None:
    own = json.loads((folder / CERTIFICATE_FILE).read_text())
    (tmp_path / CERTIFICATE_FILE).write_text(broken(own, path, value))
    with pytest.raises(ValueError, match=rf"certificate.json is no certificate of this version: {message}") as caught:
        read_certificate(tmp_path, weights=folder)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_json_is_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    (tmp_path / CERTIFICATE_FILE).write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"no certificate of this version: the file: Invalid JSON") as caught:
        read_certificate(tmp_path, weights=folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stopped_at", range(3))
def test_whoever_is_stopped_while_writing_leaves_a_folder_that_loads(
    folder: Path, stopped_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(3))
    replace_file = manifest._replace

    def stopping(path: Path, data: bytes) -> None:
        if next(calls) == stopped_at:
            raise KeyboardInterrupt
        replace_file(path, data)

    monkeypatch.setattr(manifest, "_replace", stopping)
    former = certificate_of(folder)
    with pytest.raises(KeyboardInterrupt):
        write_certificate(folder, replace(former, stored={"q8": 1}))
    monkeypatch.undo()
    DcpFolder(folder)
    assert read_certificate(folder) == (former if stopped_at < 2 else replace(former, stored={"q8": 1}))
    write_certificate(folder, former)
    assert read_certificate(folder) == former


def test_another_configuration_is_added_and_the_same_is_replaced(folder: Path) -> None:
    earlier = certificate_of(folder)
    at_two = replace(MEASUREMENT, tensor_parallel_size=2)
    both = replace(earlier, measurements=(at_two,)).joined(earlier)
    assert both is not None
    assert both.measurements == (MEASUREMENT, at_two)
    later = replace(MEASUREMENT, figures=replace(FIGURES, kl_mean=1.0), torch="2.14.0")
    again = replace(earlier, measurements=(later,)).joined(both)
    assert again is not None
    assert again.measurements == (at_two, later)


def test_measurements_over_another_text_are_not_joined(folder: Path) -> None:
    earlier = certificate_of(folder)
    assert replace(earlier, text=replace(earlier.text, stride=256)).joined(earlier) is None
    assert replace(earlier, reference=replace(earlier.reference, weights="others")).joined(earlier) is None
