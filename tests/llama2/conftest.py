"""One tokenizer of each kind, made once for all tests of the package."""

from __future__ import annotations

import pytest

from llama2.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizer_json import smollm2_tokenizer
from tests.support.tokenizers import tiny_sentencepiece


@pytest.fixture(scope="session")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_sentencepiece(tmp_path_factory.mktemp("sp")))


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(smollm2_tokenizer(tmp_path_factory.mktemp("bpe")))
