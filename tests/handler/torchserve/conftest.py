from __future__ import annotations

import pytest

from handler.torchserve import transport
from tests.handler.torchserve.worker import Worker


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """One that waits for calls until they are prepared, however busy the machine."""
    monkeypatch.setattr(transport, "PREPARE_SECONDS", 5.0)
    monkeypatch.setattr(transport, "ALONE_SECONDS", 5.0)
    return Worker()
