"""Real servers for the end-to-end tests, each with free ports and its own folder."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from handler.torchserve.server.process import TorchServe
from scripts.temporary_server import temporary_server
from tests.handler.support import settings

SETTINGS = settings({"deviceType": "cpu"}, dtype="float32", max_seq_len=1024, max_batch_size=8, max_step_tokens=256)
PROMPT = "The history of the lighthouse begins"
FOREVER = {"prompt": PROMPT, "max_new_tokens": None, "ignore_eos": True, "temperature": 0}


def wait_until(condition: Callable[[], bool], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running server, and how to talk to it."""

    server: TorchServe

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.ports.inference}/predictions/llama"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.server.key('inference')}"}

    def client(self) -> httpx.Client:
        return httpx.Client(headers=self.headers, timeout=120, trust_env=False)

    def ask(self, **body: Any) -> Any:
        """The reply to a JSON body that is expected to be fine."""
        with self.client() as client:
            reply = client.post(self.url, json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def gauge(self, name: str) -> int:
        """What the engine last published about itself."""
        text = httpx.get(f"http://127.0.0.1:{self.server.ports.metrics}/metrics", trust_env=False).text
        found = re.search(rf"^{name}{{.*}} ([\d.]+)$", text, re.MULTILINE)
        return int(float(found[1])) if found else 0

    def rank_pid(self, rank: int) -> int:
        """The process that holds a rank of the model."""
        pids = [process.pid for process in self.server.processes() if process.environ().get("LOCAL_RANK") == str(rank)]
        assert len(pids) == 1, pids
        return pids[0]


@contextlib.contextmanager
def serving(checkpoint: Path, config: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Archive and serve `checkpoint`, and stop it in the end."""
    with temporary_server(checkpoint, config, environ) as server:
        yield Served(server=server)


@pytest.fixture(scope="session")
def served(smollm2_checkpoint: Path) -> Iterator[Served]:
    """SmolLM2 at TP=2 on the CPU, in fp32: what is computed together cannot change a token."""
    with serving(smollm2_checkpoint, SETTINGS) as running:
        yield running
