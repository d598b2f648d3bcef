from __future__ import annotations

import pytest

from tests.handler.torchserve.worker import Worker


@pytest.fixture
def worker() -> Worker:
    return Worker()
