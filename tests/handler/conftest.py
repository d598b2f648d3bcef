"""The OpenAI API over a byte-level tokenizer, with room for 100 tokens and 4 replies at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.handler.openai.support import Server, make_server


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return make_server(tmp_path)


@pytest.fixture
def server_with_room(tmp_path: Path) -> Server:
    """For prompts with tools in them."""
    return make_server(tmp_path, max_seq_len=2000)
