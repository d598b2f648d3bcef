"""Owns a server that lives as long as a `with` block: its archive, free ports, and a folder that is removed at the end.

Knows nothing of the requests that it gets.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scripts.torchserve import Ports, ServerError, TorchServe

ROOT = Path(__file__).resolve().parent.parent
MODEL = "llama"


@contextlib.contextmanager
def temporary_server(
    checkpoint: Path, config: Mapping[str, Any], environ: Mapping[str, str] | None = None, *, timeout: float = 120
) -> Iterator[TorchServe]:
    """Archive `checkpoint` with the settings `config` (of a model-config.yaml), serve it, and stop it at the end.

    Raises:
        ServerError: the archive was refused (its words are on stderr), or the server not READY in `timeout` seconds.
    """
    # A short path: worker sockets lie below it, and their names are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="llama-"))
    (folder / "model-config.yaml").write_text(yaml.safe_dump(dict(config)))
    command = ["build_archive.py", "--checkpoint", str(checkpoint), "--config", str(folder / "model-config.yaml")]
    server = TorchServe(folder=folder / "server", ports=_free_ports())
    try:
        command += ["--model_store", str(folder / "store")]
        if subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise ServerError(f"no archive could be made of {checkpoint}; the reason is above")
        server.start(model_store=folder / "store", model=MODEL, settings=ROOT, environ=environ)
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
        names = ("inference", "management", "metrics", "grpc_inference", "grpc_management")
        return Ports(**{name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)})
