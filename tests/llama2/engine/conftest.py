"""A small random model, converted."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama2.config import EngineConfig
from llama2.engine.engine import Engine
from llama2.engine.loading import load_engine
from tests.support.checkpoints import write_checkpoint
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import random_weights, tiny_args


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    args = tiny_args(vocab_size=512, n_kv_heads=2)
    tokenizer_file = tiny_sentencepiece(folder, vocab_size=512)
    return write_checkpoint(folder / "checkpoint", args, random_weights(args), tokenizer_file)


@pytest.fixture(params=[False, True], ids=["step by step", "looking ahead"])
def engine(folder: Path, request: pytest.FixtureRequest) -> Engine:
    engine = load_engine(folder, config=EngineConfig(max_seq_len=96, max_batch_size=4, seed=3))
    engine._looks_ahead = request.param
    return engine
