"""One tokenizer of each kind, made once for all tests of the package, and only where a test asks for it.

Tests that need no tokenizer thus run where its libraries are not installed.
"""

from __future__ import annotations

import pytest

from llama2.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def sp(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tests.support.tokenizers import tiny_sentencepiece

    return load_tokenizer(tiny_sentencepiece(tmp_path_factory.mktemp("sp")))


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from tests.support.tokenizer_json import smollm2_tokenizer

    return load_tokenizer(smollm2_tokenizer(tmp_path_factory.mktemp("bpe")))
