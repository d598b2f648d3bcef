"""Owns `make serve` and `make stop`: a real model from its file to its first replies over HTTP.

It skips a step whose result exists, and writes into build/ alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fire
import yaml

from handler.torchserve.gpu_mask import entries, requested
from handler.torchserve.server.archive import PACKAGES, build_archive
from handler.torchserve.server.command import wait
from handler.torchserve.server.process import Ports, ServerError, TorchServe
from llama2.weights.precision import PRECISIONS
from scripts.smollm2 import gguf_file

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
MODEL = "llama"
CONVERTERS = 2
READY_SECONDS = 600


def serve(*, quantize: str | None = None, tp: int | None = None, port: int = 8080) -> None:
    """Convert, archive and serve SmolLM2-135M-Instruct, and ask it two things.

    Args:
        quantize: int8, int4, nf4 or nf4_double, or none for bf16; by default the file's own precision, 4 bits with
            groups' minima.
        tp: ranks; by default 2, or as many GPUs as there are up to 2. On GPUs where each rank has one, else on the CPU.
        port: of the inference API; the management, metrics and gRPC APIs have the next four.
    """
    if quantize is not None and quantize not in ("none", *PRECISIONS):
        raise ServerError(f"QUANTIZE must be none, {', '.join(PRECISIONS)}, got {quantize!r}")
    if tp is not None and (type(tp) is not int or not 1 <= tp <= 1024):
        raise ServerError(f"TP must be a whole number from 1 to 1024, got {tp!r}")
    ports = Ports.counted_from(port)
    server = start(convert(quantize), tp=tp, ports=ports)
    print(f"\n$ KEY={server.key('inference')}")
    for file in ("sample_text.txt", "dialogs.txt"):
        _curl(server, file)
    print(f"\nThe server goes on running; its logs are in {BUILD.relative_to(ROOT)}/server/logs. To stop it: make stop")


def convert(quantize: str | None) -> Path:
    """The demo's model, converted, if it is not yet."""
    converted = BUILD / "converted_checkpoints"
    precision: list[str] = []
    if quantize is not None:
        converted = converted.with_name(f"{converted.name}-{quantize}")
        precision = ["--quantize", quantize, "--requantize"]
    if not (converted / ".metadata").exists():
        run(f"convert SmolLM2-135M-Instruct with {CONVERTERS} processes", "-m", "torch.distributed.run",
            "--standalone", "--nproc_per_node", CONVERTERS, "convert_checkpoints.py",
            "--original_ckpt_dir", gguf_file(), "--save_checkpoint_dir", converted, *precision)  # fmt: skip
    return converted


def start(converted: Path, *, tp: int | None, ports: Ports, **handler: Any) -> TorchServe:
    """A server that is READY, with these keys of the section `handler`: the one that runs, if it has them."""
    server, store = TorchServe(folder=BUILD / "server", ports=ports), BUILD / "model_store"
    config = _write_config(tp, converted_ckpt_dir=str(converted), **handler)
    state_file, state = BUILD / "server" / "serving", _fingerprint(config, ports.inference)
    if server.running and state_file.exists() and state_file.read_text() == state:
        print("== the server runs already, with these settings")
    else:
        if not server.running:
            server.ports.check_free()
        print("== archive")
        build_archive(config=str(config), model_store=str(store), model_name=MODEL)
        stop_former(server)
        print("== start TorchServe")
        server.start(model_store=store, model=MODEL)
        state_file.write_text(state)
    wait(server, MODEL, timeout=READY_SECONDS)
    return server


def stop_former(server: TorchServe) -> None:
    """Stop what runs in the server's folder, and say so."""
    if server.running:
        print("== stop the server that make serve or make finetune started: it has other settings or older code")
    server.stop()


def stop() -> None:
    """Stop the server that `serve` started, and no other."""
    stopped = TorchServe(folder=BUILD / "server", ports=Ports()).stop()
    print("the server has stopped" if stopped else "no server of this folder is running")


def run(what: str, *arguments: object) -> None:
    """Run Python with these arguments, and say so.

    Raises:
        ServerError: it fails.
    """
    print(f"== {what}", flush=True)
    command = [sys.executable, *map(str, arguments)]
    print("   " + shlex.join(command), flush=True)
    done = subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ})
    if done.returncode:
        raise ServerError(f"this step failed: {what}")


def _write_config(tp: int | None, **handler: Any) -> Path:
    settings = local_settings(tp)
    settings["handler"] |= handler
    BUILD.mkdir(exist_ok=True)
    path = BUILD / "model-config.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def local_settings(tp: int | None) -> dict[str, Any]:
    """The repository's model-config.yaml with this machine's degree, device and threads."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    gpus = _count_gpus() if settings.get("deviceType") == "gpu" else 0
    ranks = tp or min(2, gpus) or 2
    on_gpu = gpus >= ranks
    if gpus and not on_gpu:
        print(f"== TP={ranks}, but there are {gpus} GPUs: the CPU is used")
    settings["deviceType"] = "gpu" if on_gpu else "cpu"
    settings["handler"]["tensor_parallel_size"] = ranks
    return settings


def _count_gpus() -> int:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        return _count_visible(listed, requested(os.environ))
    return 0


def _count_visible(listed: str, mask: str | None) -> int:
    """How many GPUs a mask leaves of those that `nvidia-smi -L` lists: like CUDA, up to the first that is not there."""
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    if mask is None:
        return count
    exist = [int(name) < count if name.isdecimal() else f"(UUID: {name}" in listed for name in entries(mask)]
    return (*exist, False).index(False)


def _fingerprint(config: Path, port: int) -> str:
    """What a running server was started with: its settings, its GPUs and the code in its archive."""
    digest = hashlib.sha256(f"{port} {requested(os.environ)}".encode())
    archived = [path for package in PACKAGES for path in sorted(package.rglob("*"))]
    code = [path for path in archived if path.is_file() and path.parent.name != "__pycache__"]
    for path in (config, *code):
        digest.update(f"{path} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _curl(server: TorchServe, file: str) -> None:
    """Show the command that a user would type, do what it does, and show the reply."""
    url = f"http://127.0.0.1:{server.ports.inference}/predictions/{MODEL}"
    command = f'curl -sS {url} -H "Authorization: Bearer $KEY" -T {file}'
    print(f"\n$ {command}", flush=True)
    key = server.key("inference")
    if shutil.which("curl"):
        environ = {**os.environ, "KEY": key}
        reply = subprocess.run(command, cwd=ROOT, env=environ, shell=True, capture_output=True, check=True).stdout
    else:
        # Without a type, urllib would say that it is a form, of which TorchServe hands on no body.
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(url, (ROOT / file).read_bytes(), headers, method="PUT")
        with urllib.request.urlopen(request) as response:
            reply = response.read()
    print(json.dumps(json.loads(reply), indent=2, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        fire.Fire({"serve": serve, "stop": stop}, command=arguments)
    except (ServerError, ValueError) as error:
        sys.exit(f"\nerror: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped: the same command goes on with what is there already")


if __name__ == "__main__":
    main()
