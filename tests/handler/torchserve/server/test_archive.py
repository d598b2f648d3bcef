import dataclasses
import json
import logging
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from handler.torchserve.model_config import read_model_config
from handler.torchserve.server.archive import build_archive, main
from llama2.weights.certificate import CERTIFICATE_FILE, read_certificate, write_certificate
from llama2.weights.formats.catalog import save_formats
from llama2.weights.formats.q4 import Q4
from llama2.weights.manifest import Manifest
from tests.handler.support import ROOT, byte_tokenizer, settings
from tests.support.certificates import certificate_of
from tests.support.weights import tiny_args


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a yaml and what looks like a converted checkpoint beside it."""
    checkpoint = tmp_path / "converted_checkpoints"
    checkpoint.mkdir()
    (checkpoint / ".metadata").touch()
    tiny_args().save(checkpoint)
    byte_tokenizer(checkpoint)
    write_yaml(tmp_path)
    return tmp_path


def write_yaml(project: Path, **handler: Any) -> None:
    (project / "model-config.yaml").write_text(yaml.safe_dump(settings(**handler)))


def build(project: Path, **options: Any) -> Path:
    """Build it from another working directory than the project's."""
    store = project / "store"
    build_archive(config=str(project / "model-config.yaml"), model_store=str(store), **options)
    return store


def test_the_archive_holds_the_packages_and_a_yaml_that_finds_the_weights_from_anywhere(project: Path) -> None:
    archive = build(project) / "llama"
    packages = [ROOT / "handler", ROOT / "llama2"]
    sources = {path.relative_to(ROOT) for package in packages for path in package.rglob("*.py")}
    assert sources <= {path.relative_to(archive) for path in archive.rglob("*.py")}
    archived = yaml.safe_load((archive / "model-config.yaml").read_text())
    assert read_model_config(archived, base=Path("/")).converted_ckpt_dir == project / "converted_checkpoints"
    manifest = json.loads((archive / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert (manifest["modelName"], manifest["modelVersion"], manifest["handler"], manifest["configFile"]) == (
        *("llama", "1.0", "llama_handler.py", "model-config.yaml"),
    )


def test_weights_are_not_copied(project: Path) -> None:
    (project / "converted_checkpoints" / "__0_0.distcp").write_bytes(bytes(10_000_000))
    archive = build(project) / "llama"
    assert sum(path.stat().st_size for path in archive.rglob("*") if path.is_file()) < 2_000_000


def test_it_carries_the_certificate_of_the_weights_and_no_other(project: Path) -> None:
    checkpoint = project / "converted_checkpoints"
    assert not (build(project) / "llama" / CERTIFICATE_FILE).exists()
    Manifest(checkpoint, {}).write()
    certificate = certificate_of(checkpoint)
    write_certificate(checkpoint, certificate)
    assert read_certificate(build(project) / "llama", weights=checkpoint) == certificate
    write_certificate(checkpoint, dataclasses.replace(certificate, weights="of another folder"))
    with pytest.raises(ValueError, match=r"certificate.json is not about the weights in .*: remove it, or measure"):
        build(project)


def test_without_a_yaml_the_one_of_the_package_is_taken(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (project / "model-config.yaml").unlink()
    monkeypatch.chdir(project)
    with caplog.at_level(logging.INFO):
        archive = build_archive(model_store="store")
    archived = yaml.safe_load((archive / "model-config.yaml").read_text())
    assert archived["handler"]["converted_ckpt_dir"] == str(project / "converted_checkpoints")
    assert "server/model-config.yaml" in caplog.text


def test_checkpoint_on_the_command_line_wins_over_the_yaml(project: Path) -> None:
    (project / "converted_checkpoints").rename(project / "elsewhere")
    archive = build(project, checkpoint=str(project / "elsewhere")) / "llama"
    archived = yaml.safe_load((archive / "model-config.yaml").read_text())
    assert archived["handler"]["converted_ckpt_dir"] == str(project / "elsewhere")


def test_a_mar_file_has_the_name_and_version_asked_for(project: Path) -> None:
    store = build(project, model_name="llama-7b", version="1.10", archive_format="default")
    assert [path.name for path in store.iterdir()] == ["llama-7b.mar"]
    with zipfile.ZipFile(store / "llama-7b.mar") as mar:
        assert json.loads(mar.read("MAR-INF/MANIFEST.json"))["model"]["modelVersion"] == "1.10"
        assert "llama2/engine/engine.py" in mar.namelist()


def test_building_again_replaces_the_archive_whole(project: Path) -> None:
    (build(project) / "llama" / "left_over.py").touch()
    write_yaml(project, max_seq_len=99)
    store = build(project)
    assert not (store / "llama" / "left_over.py").exists()
    assert yaml.safe_load((store / "llama" / "model-config.yaml").read_text())["handler"]["max_seq_len"] == 99
    assert [path.name for path in store.iterdir()] == ["llama"]


def test_a_failure_leaves_the_old_archive_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = build(project) / "llama"
    before = sorted(archive.rglob("*"))
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")  # the archiver cannot even start
    with pytest.raises(ValueError, match="torch-model-archiver failed"):
        build(project)
    assert sorted(archive.rglob("*")) == before
    assert [path.name for path in archive.parent.iterdir()] == ["llama"]


def test_a_folder_that_is_no_archive_is_never_replaced(project: Path) -> None:
    precious = project / "store" / "llama" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.touch()
    with pytest.raises(ValueError, match="is no model archive"):
        build(project)
    assert precious.exists()


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"model_name": "../llama"}, "--model_name must be"),
        (None, {"archive_format": "tgz"}, "--archive_format must be one of no-archive, default, got 'tgz'"),
        (None, {"checkpoint": "nowhere"}, "--checkpoint 'nowhere' does not exist"),
        ("model-config.yaml", {}, "model-config.yaml cannot be read"),
        ("converted_checkpoints/.metadata", {}, "is no converted checkpoint"),
        ("converted_checkpoints/model_args.json", {}, "model_args.json does not exist"),
        ("converted_checkpoints/tokenizer.json", {}, "has no tokenizer"),
    ],
)
def test_a_mistake_is_found_before_anything_is_built(
    project: Path, spoil: str | None, options: dict[str, str], message: str
) -> None:
    if spoil is not None:
        (project / spoil).unlink()
    with pytest.raises(ValueError) as caught:
        build(project, **options)
    assert message in str(caught.value)
    assert not list((project / "store").glob("*"))


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "is no valid yaml"), ("just words", "holds no keys"), ("\x00", "is no valid yaml")]
)
def test_a_malformed_yaml_is_refused(project: Path, text: str, message: str) -> None:
    (project / "model-config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        build(project)


def test_a_degree_that_the_model_cannot_take_is_refused_before_a_server_tries(project: Path) -> None:
    wrong = settings(tensor_parallel_size=3)
    (project / "model-config.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ValueError, match="cannot run at tensor-parallel degree 3; it can at 1, 2, 4, 8"):
        build(project)
    assert not (project / "store" / "llama").exists()


def test_a_degree_that_quantized_weights_exclude_is_refused(project: Path) -> None:
    args = tiny_args()
    save_formats(project / "converted_checkpoints", {"layers.0.feed_forward.w2": Q4(group=args.hidden_dim // 2)})
    write_yaml(project, tensor_parallel_size=4)
    with pytest.raises(ValueError, match=r"its hidden in groups of \d+, cannot run at tensor-parallel degree 4"):
        build(project)


def test_a_flag_that_does_not_exist_is_noticed_before_anything_is_made(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = project / "store"
    monkeypatch.setattr("sys.argv", ["build_archive.py", "--model_store", str(store), "--chekpoint", "x"])
    with pytest.raises(SystemExit, match=r"unknown option --chekpoint: did you mean --checkpoint\?"):
        main()
    assert not store.exists()


def test_a_value_on_the_command_line_is_a_text_whatever_it_looks_like(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--config", str(project / "model-config.yaml"), f"--model_store={project}", "--model_name", "007"]
    monkeypatch.setattr("sys.argv", ["build_archive.py", *options, "--version", "1.10"])
    main()
    manifest = json.loads((project / "007" / "MAR-INF" / "MANIFEST.json").read_text())
    assert manifest["model"]["modelVersion"] == "1.10"
    monkeypatch.setattr("sys.argv", ["build_archive.py", "--model_name", "--version", "1.10"])
    with pytest.raises(SystemExit, match=r"^error: --model_name needs a value$"):
        main()


def test_the_help_has_the_flags_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["build_archive.py", "--checkpoint", "x", "--help"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    text = capsys.readouterr().err
    assert "what convert_checkpoints.py wrote" in text
    assert "FIRE" not in text
    assert "GROUP" not in text


def test_the_archiver_may_be_anywhere_on_the_path(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = Path(sysconfig.get_path("scripts"))
    elsewhere = tmp_path / "bin"
    elsewhere.mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(ValueError, match=r"^torch-model-archiver is neither beside the interpreter nor on PATH: pip"):
        build(project)
    (elsewhere / "torch-model-archiver").symlink_to(beside / "torch-model-archiver")
    assert (build(project) / "llama").is_dir()
