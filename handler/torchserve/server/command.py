"""Owns `llama2-serve`: an archive of a converted checkpoint, a TorchServe for it, and a wait that ends.

The server runs until Ctrl-C, in a folder of its own beside the archive, its keys and its logs. Knows no model maths.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

from handler.torchserve.server.archive import CONFIG, build_archive
from handler.torchserve.server.process import Ports, ServerError, TorchServe
from llama2.flags import run

MODEL = "llama"
# Seconds beyond the yaml's startupTimeout: TorchServe itself gives up first, and its log says why.
_GRACE = 60


def serve(*, config: str | None = None, checkpoint: str | None = None, port: int = 8080, stop: bool = False) -> None:
    """Serve a converted checkpoint until Ctrl-C: make its archive, start TorchServe, and wait until it answers.

    Archive, keys and logs are in llama2-serve-PORT in the current folder.

    Args:
        config: the model-config.yaml; by default the one in the current folder, else the one of the package.
        checkpoint: what convert_checkpoints.py wrote; by default the yaml's converted_ckpt_dir.
        port: of the inference API; the management, metrics and two gRPC ports are the next four.
        stop: instead of all this, stop the server of that port that was started in the current folder.
    """
    if not isinstance(stop, bool):
        raise ValueError(f"--stop is a switch and takes no value, got {stop!r}")
    folder = Path.cwd() / f"llama2-serve-{port}"
    server = TorchServe(folder=folder, ports=Ports.counted_from(port))
    asked_to_stop = folder / "asked_to_stop"  # by another llama2-serve, for the one that waits here
    if stop:
        if server.running:
            asked_to_stop.touch()
        if not server.stop():
            raise ServerError(f"no server of {folder} is running: --stop goes where llama2-serve was started")
        print("the server has stopped")
        return
    if server.running:
        raise ServerError(f"the server of {folder} runs already; llama2-serve --stop --port {port} ends it")
    server.ports.check_free()
    print("== archive")
    archive = build_archive(
        config=None if config is None else str(config),
        checkpoint=None if checkpoint is None else str(checkpoint),
        model_store=str(folder / "model_store"),
        model_name=MODEL,
    )
    seconds = yaml.safe_load((archive / CONFIG).read_text(encoding="utf-8")).get("startupTimeout", 1200)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    asked_to_stop.unlink(missing_ok=True)
    try:
        print(f"== start TorchServe; its logs are in {folder}/logs")
        server.start(model_store=archive.parent, model=MODEL)
        wait(server, MODEL, timeout=seconds + _GRACE)
        _show(server)
        while server.running:
            time.sleep(2)
        raise ServerError(f"TorchServe has ended: {folder}/logs/ts_log.log says why")
    except ServerError:
        if not asked_to_stop.exists():
            raise
        print("the server was stopped from elsewhere")
    finally:
        if server.stop():
            print("the server has stopped")


def wait(server: TorchServe, model: str, *, timeout: float) -> None:
    """Wait until every worker of `model` is READY, with a line that shows for how long. If that fails, stop the server.

    Raises:
        ServerError: it failed, or did not succeed in `timeout` seconds.
    """
    began = time.monotonic()

    def progress(waited: float) -> None:
        if sys.stdout.isatty():
            print(f"\r== wait until the workers are READY: {waited:.0f} s ", end="", flush=True)

    if not sys.stdout.isatty():
        print("== wait until the workers are READY", flush=True)
    try:
        server.wait_ready(model, timeout=timeout, progress=progress)
    except BaseException:
        if server.stop():
            print("\nthe server has stopped", flush=True)
        raise
    print(f"\r== the workers are READY after {time.monotonic() - began:.0f} s    ")


def _show(server: TorchServe) -> None:
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/{MODEL}"
    print(
        f"""
    KEY={server.key("inference")}
    curl {url} -H "Authorization: Bearer $KEY" -H 'Content-Type: application/json' \\
        -d '{{"prompt": "The capital of France is", "max_new_tokens": 20}}'

OpenAI clients: base_url={url}/1.0/v1 api_key=$KEY
The keys are in {server.folder}/key_file.json too, and valid for a week. To end the server: Ctrl-C""",
        flush=True,
    )


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that the server is stopped; a second signal must not end that."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(serve, mistakes=(ValueError, OSError, ServerError))


if __name__ == "__main__":
    main()
