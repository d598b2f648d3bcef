import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from handler.torchserve.model_config import read_model_config
from handler.torchserve.server.archive import PACKAGES
from handler.torchserve.server.process import Ports, TorchServe
from scripts import serve
from scripts.finetune_demo import has_adapter


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(serve, "BUILD", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "tp", "ranks", "device"),
    [
        (0, None, 2, "cpu"),
        (0, 3, 3, "cpu"),
        (1, None, 1, "gpu"),
        (4, None, 2, "gpu"),
        (4, 4, 4, "gpu"),
        (1, 2, 2, "cpu"),  # NCCL wants a GPU for each rank
    ],
)
def test_each_rank_gets_its_own_gpu_or_all_share_the_cpu(
    gpus: int, tp: int | None, ranks: int, device: str, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "_count_gpus", lambda: gpus)
    settings = yaml.safe_load(serve._write_config(tp, converted_ckpt_dir=str(build)).read_text())
    assert (settings["handler"]["tensor_parallel_size"], settings["deviceType"]) == (ranks, device)
    assert read_model_config(settings, base=Path("/")).converted_ckpt_dir == build


def test_a_server_that_is_replaced_is_named(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = TorchServe(folder=build / "server", ports=Ports())
    serve.stop_former(server)
    assert capsys.readouterr().out == ""
    words = [f"-Djava.io.tmpdir={build}/server/tmp", "org.pytorch.serve.ModelServer"]
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]) as process:
        while not server.running:
            time.sleep(0.01)
        serve.stop_former(server)
        process.wait()
    assert not server.running
    assert "stop the server that make serve or make finetune started" in capsys.readouterr().out


def test_an_adapter_of_an_earlier_run_is_used_and_named(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not has_adapter(build)
    (build / "adapter").mkdir()
    assert has_adapter(build)
    assert (
        f"the adapter that an earlier run tuned, in {build}/adapter: for another one remove" in capsys.readouterr().out
    )


LISTED = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-8f1c9f0e-1)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-77aa0b1c-2)
  MIG 3g.40gb     Device  0: (UUID: MIG-5d2e)
GPU 2: NVIDIA H100 80GB HBM3 (UUID: GPU-03dd2e3f-4)
"""


@pytest.mark.parametrize(
    ("mask", "count"),
    [
        (None, 3),
        ("", 0),
        ("-1", 0),
        ("1,2", 2),
        ("2", 1),
        ("0,3,1", 1),  # CUDA stops where one does not exist
        ("GPU-03dd2e3f-4,GPU-8f1c", 2),  # enough of a UUID to say which
        ("MIG-5d2e", 1),
        ("GPU-ffff,0", 0),
    ],
)
def test_gpus_are_counted_as_the_mask_leaves_them(
    mask: str | None, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{LISTED}END\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("LLAMA_VISIBLE_DEVICES", raising=False)
    if mask is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert serve._count_gpus() == count


def test_a_running_server_is_kept_only_for_the_same_settings_gpus_and_code(
    build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state(tp: int, port: int = 8080) -> str:
        return serve._fingerprint(serve._write_config(tp, converted_ckpt_dir=str(build)), port)

    assert state(1) == state(1)
    states = {state(1), state(2), state(1, port=9080)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert len({*states, state(1)}) == 4


@pytest.mark.parametrize("edited", ["*.py", "*.cpp", "*.h", "*.properties", "*.xml"])
def test_a_running_server_is_not_kept_after_an_edit_of_what_is_in_its_archive(
    edited: str, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in PACKAGES:
        shutil.copytree(package, build / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(serve, "PACKAGES", [build / package.name for package in PACKAGES])
    config = serve._write_config(1, converted_ckpt_dir=str(build))
    before = serve._fingerprint(config, 8080)
    (build / "llama2" / "__pycache__").mkdir()
    (build / "llama2" / "__pycache__" / "model.pyc").touch()
    assert serve._fingerprint(config, 8080) == before
    with next(file for package in PACKAGES for file in (build / package.name).rglob(edited)).open("a") as source:
        source.write("\n")
    assert serve._fingerprint(config, 8080) != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tp", "x"], "TP must be a whole number from 1 to 1024, got 'x'"),
        (["--tp", "0"], "TP must be a whole number from 1 to 1024, got 0"),
        (["--quantize", "int3"], "QUANTIZE must be none, int8, int4, nf4, nf4_double, got 'int3'"),
        (["--port", "1023"], "the port must be a whole number from 1024 to 65531, got 1023"),
        (["--port", "99999"], "the port must be a whole number from 1024 to 65531, got 99999"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_done(arguments: list[str], message: str, build: Path) -> None:
    with pytest.raises(SystemExit, match=message):
        serve.main(["serve", *arguments])
    assert not any(build.iterdir())
