"""Owns a server that lives as long as a `with` block: its archive, free ports, and a folder that is removed at the end.

Knows nothing of the requests that it gets.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from handler.torchserve.server.archive import build_archive
from handler.torchserve.server.process import Ports, ServerError, TorchServe

MODEL = "llama"


@contextlib.contextmanager
def temporary_server(
    checkpoint: Path, config: Mapping[str, Any], environ: Mapping[str, str] | None = None, *, timeout: float = 120
) -> Iterator[TorchServe]:
    """Archive `checkpoint` with the settings `config` (of a model-config.yaml), serve it, and stop it at the end.

    Raises:
        ServerError: the archive was refused, or the server not READY in `timeout` seconds.
    """
    # A short path: worker sockets lie below it, and their names are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="llama-"))
    (folder / "model-config.yaml").write_text(yaml.safe_dump(dict(config)))
    server = TorchServe(folder=folder / "server", ports=_free_ports())
    try:
        try:
            build_archive(
                checkpoint=str(checkpoint),
                config=str(folder / "model-config.yaml"),
                model_store=str(folder / "store"),
                model_name=MODEL,
            )
        except ValueError as error:
            raise ServerError(str(error)) from None
        server.start(model_store=folder / "store", model=MODEL, environ=environ)
        server.wait_ready(MODEL, timeout=timeout)
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> Ports:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(5)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return Ports.listed(probe.getsockname()[1] for probe in probes)
