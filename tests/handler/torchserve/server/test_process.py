import socket
from pathlib import Path

import pytest

from handler.torchserve.server import java, process
from handler.torchserve.server.process import Ports, ServerError, TorchServe
from tests.handler.support import ROOT


def test_ports_replace_those_of_the_shipped_file_and_keep_the_rest() -> None:
    shipped = (ROOT / "config.properties").read_text()
    lines = Ports(inference=9080, metrics=9082).properties(shipped).splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings["inference_address"] == "http://127.0.0.1:9080"
    assert settings["metrics_address"] == "http://127.0.0.1:9082"
    assert settings["management_address"] == "http://127.0.0.1:8081"
    assert settings["grpc_inference_port"] == "8083"
    assert settings["metrics_mode"] == "prometheus"
    assert len([line for line in lines if line.startswith("inference_address")]) == 1


def test_the_shipped_file_keeps_to_this_machine_and_asks_for_keys_that_last_a_day() -> None:
    lines = (ROOT / "config.properties").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    addresses = [value for key, value in settings.items() if key.endswith("_address")]
    assert len(addresses) == 5
    assert all(value.removeprefix("http://").startswith("127.0.0.1") for value in addresses)
    assert "disable_token_authorization" not in settings
    assert int(settings["token_expiration_min"]) >= 24 * 60


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} is in use by another program"):
            Ports(metrics=port).check_free()


def test_a_folder_without_a_server_has_nothing_to_stop(tmp_path: Path) -> None:
    server = TorchServe(folder=tmp_path, ports=Ports())
    assert not server.running
    assert not server.stop()


def test_the_mask_of_gpus_is_kept_from_torchserve_and_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr(process, "find_java_home", lambda: (True, None))
    environ = TorchServe(folder=tmp_path, ports=Ports())._environ({"CUDA_VISIBLE_DEVICES": "6"})
    assert "CUDA_VISIBLE_DEVICES" not in environ
    assert environ["LLAMA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize(
    ("words", "usable"),
    [
        ('openjdk version "17.0.15" 2025-04-15', True),
        ('openjdk version "11" 2018-09-25', True),
        ('java version "1.8.0_392"', False),
        ("no version at all", False),
    ],
)
def test_a_java_of_version_11_or_newer_will_do(
    words: str, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho '{words}' >&2\n")
    program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    assert java.find_java_home() == (usable, None)
