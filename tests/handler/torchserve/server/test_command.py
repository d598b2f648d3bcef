"""`llama2-serve` waits until the model answers, or ends with the reason; it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from handler.torchserve.server.command import serve
from handler.torchserve.server.process import Ports, ServerError, TorchServe
from llama2.weights.convert import convert
from tests.handler.support import ROOT
from tests.support.tokenizers import tiny_sentencepiece
from tests.support.weights import meta_folder, random_weights, tiny_args


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"port": 80}, "the port must be a whole number from 1024 to 65531, got 80"),
        ({"port": 65532}, "the port must be a whole number"),
        ({"port": "x"}, "the port must be a whole number"),
        ({"stop": 3}, "--stop is a switch"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({}, "--checkpoint 'converted_checkpoints' does not exist"),
        ({"checkpoint": "nowhere"}, "--checkpoint 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        serve(**{"port": free_port(), **options})
    assert not any(tmp_path.iterdir())


def test_an_error_in_the_yaml_names_the_file_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "model-config.yaml").read_text().replace("max_seq_len", "max_sequence_len")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^mine\.yaml: unknown key 'max_sequence_len'"):
        serve(config="mine.yaml", port=free_port())


def test_a_taken_port_among_the_five_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port() + 4))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use by another program"):
            serve(port=port - 4)


def test_nothing_is_stopped_where_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ServerError, match=f"no server of {tmp_path}/llama2-serve-8080 is running: --stop goes where"):
        serve(stop=True)


def test_a_folder_too_deep_for_sockets_is_refused(tmp_path: Path) -> None:
    server = TorchServe(folder=tmp_path / ("deep" * 20), ports=Ports.counted_from(free_port()))
    with pytest.raises(ServerError, match="is too long for the sockets in it"):
        server.start(model_store=tmp_path, model="llama")


def free_port() -> int:
    """The first of five that are free, as far as one look can tell."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        try:
            Ports.counted_from(port).check_free()
        except (ServerError, OverflowError):
            continue
        return port


@pytest.fixture
def project() -> Iterator[Path]:
    """A folder with a converted checkpoint and a yaml for one rank on the CPU, of a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="llama-") as folder:
        yield make_project(Path(folder))


def make_project(folder: Path) -> Path:
    args = tiny_args(vocab_size=480)
    source = meta_folder(folder / "meta", args, random_weights(args, dtype=torch.bfloat16), num_shards=1)
    tiny_sentencepiece(source, vocab_size=480)
    convert(source, folder / "converted_checkpoints")
    text = (ROOT / "model-config.yaml").read_text()
    text = text.replace("tensor_parallel_size: 2", "tensor_parallel_size: 1").replace(
        'deviceType: "gpu"', 'deviceType: "cpu"'
    )
    (folder / "model-config.yaml").write_text(text)
    return folder


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """The commands that a test has started: they are ended with it."""
    commands: list[subprocess.Popen[str]] = []
    yield commands
    for one in commands:
        one.terminate()
        one.communicate(timeout=60)


def start(commands: list[subprocess.Popen[str]], project: Path, port: int, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "handler.torchserve.server.command", "--port", str(port), *options]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    commands.append(
        subprocess.Popen(command, cwd=project, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    )
    return commands[-1]


def read_until(process: subprocess.Popen[str], text: str) -> str:
    assert process.stdout
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


@pytest.mark.integration
def test_it_serves_from_any_folder_until_it_is_told_to_end(project: Path, started: list[subprocess.Popen[str]]) -> None:
    port = free_port()
    (project / f"llama2-serve-{port}").mkdir()
    (project / f"llama2-serve-{port}" / "key_file.json").write_text('{"inference": {"key": "an old one"}}')
    process = start(started, project, port)
    seen = read_until(process, "Ctrl-C")
    (key,) = re.findall(r"KEY=(\S+)", seen)
    assert key != "an old one"
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predictions/llama",
        json.dumps({"prompt": "hello", "max_new_tokens": 3}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert json.load(reply)["usage"]["completion_tokens"] == 3
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not psutil.wait_procs(family, timeout=10)[1]
    Ports.counted_from(port).check_free()


@pytest.mark.integration
@pytest.mark.parametrize("sign", ["== wait until", "Ctrl-C"], ids=["loading", "serving"])
def test_a_stop_from_another_shell_is_no_error_and_an_end_of_its_own_is(
    project: Path, started: list[subprocess.Popen[str]], sign: str
) -> None:
    port = free_port()
    process = start(started, project, port)
    read_until(process, sign)
    stop = start(started, project, port, "--stop")
    assert (stop.communicate(timeout=60)[0], stop.returncode) == ("the server has stopped\n", 0)
    output, _ = process.communicate(timeout=60)
    assert (output.splitlines()[-1], process.returncode) == ("the server was stopped from elsewhere", 0)
    if sign == "Ctrl-C":
        process = start(started, project, port)
        read_until(process, sign)
        server = TorchServe(folder=project / f"llama2-serve-{port}", ports=Ports.counted_from(port))
        server.stop()
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1
        assert output.splitlines()[-1].startswith("error: TorchServe has ended: ")


@pytest.mark.integration
def test_a_model_that_cannot_be_served_ends_it_with_the_reason(
    project: Path, started: list[subprocess.Popen[str]]
) -> None:
    data = project / "converted_checkpoints" / "__0_0.distcp"
    values = bytearray(data.read_bytes())
    values[len(values) // 2] ^= 1
    data.write_bytes(values)
    port = free_port()
    process = start(started, project, port)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"error: the model cannot be served: .*__0_0\.distcp is damaged", output)
    Ports.counted_from(port).check_free()


@pytest.mark.integration
def test_a_worker_that_ends_again_and_again_ends_it_too(project: Path, started: list[subprocess.Popen[str]]) -> None:
    (project / "converted_checkpoints" / "manifest.json").unlink()
    port = free_port()
    process = start(started, project, port)
    read_until(process, "READY")
    server = TorchServe(folder=project / f"llama2-serve-{port}", ports=Ports.counted_from(port))
    while process.poll() is None:
        for one in server.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "org.pytorch.serve.ModelServer" not in one.cmdline():
                    one.kill()
        time.sleep(0.2)
    output = process.communicate()[0]
    assert process.returncode == 1
    assert "the worker ended 3 times before it was READY" in output
    assert not server.processes()
