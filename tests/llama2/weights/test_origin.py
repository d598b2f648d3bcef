"""A converted folder says in which precisions its values were stored before, however often they were converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama2.weights.convert import OutputFormat, convert
from llama2.weights.origin import ORIGIN_FILE, describe, read_origin
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ARGS = tiny_args(vocab_size=480, n_layers=1)
VALUES = sum(weight.numel() for weight in random_weights(ARGS).values())
NORMS = 3 * ARGS.dim
HEADS = 2 * 480 * ARGS.dim


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = meta_folder(tmp_path / "source", ARGS, random_weights(ARGS, dtype=torch.bfloat16), num_shards=1)
    tiny_sentencepiece(folder, vocab_size=480)
    return folder


def test_every_conversion_adds_the_precision_that_it_has_read(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "int4", quantize="int4")
    assert read_origin(tmp_path / "int4") == ({"bfloat16": VALUES},)
    convert(tmp_path / "int4", tmp_path / "back", quantize="none")
    quantized = {"q8": HEADS, "q4": VALUES - HEADS - NORMS, "bfloat16": NORMS}
    assert read_origin(tmp_path / "back") == ({"bfloat16": VALUES}, quantized)


@pytest.mark.parametrize("output_format", ["fairscale", "hf"])
def test_it_goes_through_other_folders(source: Path, tmp_path: Path, output_format: OutputFormat) -> None:
    convert(source, tmp_path / "int4", quantize="int4")
    shards = 1 if output_format == "fairscale" else None
    convert(tmp_path / "int4", tmp_path / "other", output_format=output_format, output_model_parallel_size=shards)
    convert(tmp_path / "other", tmp_path / "again")
    steps = [set(stored) for stored in read_origin(tmp_path / "again")]
    assert steps == [{"bfloat16"}, {"q8", "q4", "bfloat16"}, {"bfloat16"}]
    assert "stored as q8 (" in describe(read_origin(tmp_path / "again"))


def test_values_that_were_never_quantized_are_said_to_be_so(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "fp32", dtype=torch.float32)
    assert read_origin(tmp_path / "fp32") == ({"bfloat16": VALUES},)
    assert describe(read_origin(tmp_path / "fp32")) == (
        "These values were stored as bfloat16 first, and never quantized since."
    )


def test_a_folder_that_does_not_say_leaves_it_open(tmp_path: Path) -> None:
    assert read_origin(tmp_path) == ()
    assert "is not recorded" in describe(())


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"Q8_0": "many"}]', '[{"Q8_0": 0}]', '[{"Q8_0": true}]', '[{"adapter": "a"}]']
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / ORIGIN_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"origin.json (cannot be read|must be a list of objects)"):
        read_origin(tmp_path)
