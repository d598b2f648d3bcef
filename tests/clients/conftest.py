"""One real server, and clients that others wrote; nobody speaks to any other machine.

The clients need their own versions, so these tests run in their own virtual environment (`make test-clients`), and the
server in the repository's: SERVER_PYTHON names the python there.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import operator
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Without `-m clients` nothing here is imported: its imports are not installed."""
    return None if "clients" in config.getoption("-m") else True


def pytest_configure(config: pytest.Config) -> None:
    """Before anything is imported that would look for a network. Subprocesses inherit it."""
    cache = tempfile.TemporaryDirectory(prefix="clients-")
    config.add_cleanup(cache.cleanup)
    os.environ |= {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
        **dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost"),
        "HF_HOME": cache.name,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    """A client that tries to reach another machine fails its test."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = "127.0.0.1" if address[0] == "localhost" else address[0]
            assert ipaddress.ip_address(host).is_loopback, f"a connection to {address}"
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """Where the server is, its key, and its weights: our checkpoint, and the same as transformers keeps them."""

    url: str
    key: str
    checkpoint: str
    reference: str

    @property
    def base_url(self) -> str:
        """What an OpenAI client gets."""
        return f"{self.url}/v1"


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    command = [os.environ.get("SERVER_PYTHON", ".venv/bin/python"), "-m", "tests.clients.server"]
    command += [str(tmp_path_factory.mktemp("server"))]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("{")), None)
        assert line is not None, "the server did not start; its own words are above"
        yield Service(**json.loads(line))
        process.stdin.close()


@pytest.fixture(scope="session")
def model(service: Service) -> str:
    """The name under which the server offers its model."""
    import openai

    with openai.OpenAI(base_url=service.base_url, api_key=service.key) as client:
        return client.models.list().data[0].id


class Asker:
    """Calls the openai client, by its sync or its async half, and collects what is streamed."""

    def __init__(self, service: Service, model: str, *, asynchronous: bool) -> None:
        self._settings: dict[str, Any] = {"base_url": service.base_url, "api_key": service.key, "max_retries": 0}
        self.model = model
        self._asynchronous = asynchronous

    def __call__(self, method: str, /, *positional: Any, settings: Any = None, **fields: Any) -> Any:
        """The result of e.g. `client.chat.completions.create(**fields)`; of a stream, the list of its chunks."""
        import openai

        if method.endswith(("create", "parse")):
            fields = {"model": self.model, **fields}
        if self._asynchronous:
            return asyncio.run(self._ask(method, positional, fields, settings or {}))
        with openai.OpenAI(**self._settings | (settings or {})) as client:
            result = operator.attrgetter(method)(client)(*positional, **fields)
            return list(result) if fields.get("stream") else result

    async def _ask(self, method: str, positional: Any, fields: dict[str, Any], settings: dict[str, Any]) -> Any:
        import openai

        async with openai.AsyncOpenAI(**self._settings | settings) as client:
            result = await operator.attrgetter(method)(client)(*positional, **fields)
            return [chunk async for chunk in result] if fields.get("stream") else result


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest, service: Service, model: str) -> Asker:
    return Asker(service, model, asynchronous=request.param == "async")
