"""A checkpoint is loaded whole or refused with what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llama2.config import EngineConfig, ModelArgs
from llama2.engine.loading import load_engine
from llama2.weights.readers.dcp import DcpFolder
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args

pytestmark = pytest.mark.filterwarnings("ignore:.*single process.*")

ARGS = tiny_args(vocab_size=512)
CONFIG = EngineConfig(max_seq_len=32, max_batch_size=2)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sentencepiece(tmp_path_factory.mktemp("tokenizer"), vocab_size=512)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_file: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", ARGS, random_weights(ARGS, dtype=torch.bfloat16), tokenizer_file)


def test_on_a_cpu_the_model_runs_in_the_checkpoints_dtype_unless_told_otherwise(folder: Path) -> None:
    def dtype(asked: torch.dtype | None = None) -> torch.dtype:
        return load_engine(folder, device="cpu", config=CONFIG, dtype=asked)._group._runner._model.dtype

    assert dtype() == DcpFolder(folder).spec.dtype == torch.bfloat16
    assert dtype(torch.float32) == torch.float32


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    dcp.save(
        {name: values for name, values in random_weights(ARGS).items() if "wk" not in name}, checkpoint_id=tmp_path
    )
    with pytest.raises(ValueError, match=r"lacks tensor layers\.0\.attention\.wk\.weight \(2 in all\)"):
        DcpFolder(tmp_path, ARGS)


def test_an_extra_tensor_is_named(tmp_path: Path) -> None:
    extra = {"layers.1.attention.bias": torch.zeros(3)}
    dcp.save({**random_weights(ARGS), **extra}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"has an unknown tensor layers\.1\.attention\.bias \(1 in all\)"):
        DcpFolder(tmp_path, ARGS)


@pytest.mark.parametrize("n_layers", [1, 3, 10**9, 10**30])
def test_another_number_of_layers_is_refused_at_once(tmp_path: Path, n_layers: int) -> None:
    write_checkpoint(tmp_path, ARGS, random_weights(ARGS))
    replace(ARGS, n_layers=n_layers).save(tmp_path)
    with pytest.raises(ValueError, match=rf"says n_layers={n_layers}, but .*\.metadata has tensors of 2 layers"):
        DcpFolder(tmp_path)


def test_another_shape_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, ARGS, random_weights(ARGS))
    other = ModelArgs.from_params({**ARGS.to_params(), "vocab_size": 500})
    with pytest.raises(ValueError, match=r"tok_embeddings\.weight is \(512, 64\), but the model's is \(500, 64\)"):
        DcpFolder(tmp_path, other)


def test_a_folder_that_is_no_checkpoint_is_refused_in_plain_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no converted checkpoint: it has no \.metadata file, which .* writes"):
        load_engine(tmp_path, config=CONFIG)
    (tmp_path / ".metadata").write_bytes(b"junk")
    with pytest.raises(ValueError, match="cannot be read"):
        DcpFolder(tmp_path, ARGS)


def test_a_damaged_data_file_is_refused(folder: Path) -> None:
    (data,) = folder.glob("*.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_engine(folder, config=CONFIG)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer_file: Path) -> None:
    args = tiny_args(vocab_size=100)
    write_checkpoint(tmp_path, args, random_weights(args), tokenizer_file)
    with pytest.raises(ValueError, match="the tokenizer has 512 ids, but the model only 100"):
        load_engine(tmp_path, config=CONFIG)


def test_the_kv_cache_is_sized_from_the_batch_or_from_free_memory(folder: Path) -> None:
    by_batch = load_engine(folder, config=CONFIG)
    assert by_batch.stats().total_blocks == 2 * 2
    by_memory = load_engine(folder, config=EngineConfig(max_seq_len=32, max_batch_size=2, kv_memory_fraction=0.001))
    assert by_memory.stats().total_blocks > 4
    with pytest.raises(ValueError, match="raise the fraction, lower max_seq_len"):
        load_engine(folder, config=EngineConfig(max_seq_len=32, max_batch_size=2, kv_memory_fraction=1e-9))
