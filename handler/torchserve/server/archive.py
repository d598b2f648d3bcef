"""Owns TorchServe's model archive (`build_archive.py`, `llama2-archive`): handler, code, a checked model-config.yaml.

The code is copied from where it is installed. The weights stay where they are: the archive names the checkpoint by its
absolute path. Their certificate goes with the archive.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import yaml

from handler.config import PATH_KEYS
from handler.torchserve.model_config import read_model_config
from handler.torchserve.server.programs import find_program
from llama2.config import ModelArgs
from llama2.flags import as_texts, check_flags
from llama2.parallel.splits import mesh_shape
from llama2.text.tokenizer import load_tokenizer
from llama2.weights.certificate import CERTIFICATE_FILE, read_certificate
from llama2.weights.kinds import FORMATS_FILE, check_converted

logger = logging.getLogger(__name__)

CONFIG = "model-config.yaml"
# What goes into it, from the source tree or from site-packages.
_ROOT = Path(__file__).resolve().parents[3]
PACKAGES = (_ROOT / "handler", _ROOT / "llama2")
SUFFIX = {"no-archive": "", "default": ".mar"}


def build_archive(
    *,
    checkpoint: str | None = None,
    config: str | None = None,
    model_store: str = "model_store",
    model_name: str = "llama",
    version: str = "1.0",
    archive_format: str = "no-archive",
) -> Path:
    """Write MODEL_STORE/MODEL_NAME (a folder), or MODEL_NAME.mar with --archive_format default, and say where it is.

    Args:
        checkpoint: what convert_checkpoints.py wrote; by default the yaml's converted_ckpt_dir, or with the yaml of the
            package converted_checkpoints in the current folder.
        config: the model-config.yaml, in whose folder its relative paths start; by default the one in the current
            folder, else the one of the package.
        model_store: the folder that torchserve --model-store gets; made if it is not there.
        model_name: the name in /predictions/MODEL_NAME.
        version: the model's version, for TorchServe's management API.
        archive_format: no-archive (a folder, which TorchServe serves in place) or default (a .mar file).
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_\-.]*", model_name):
        raise ValueError(f"--model_name must be letters, digits, '-', '_' and '.', got {model_name!r}")
    if archive_format not in SUFFIX:
        raise ValueError(f"--archive_format must be one of {', '.join(SUFFIX)}, got {archive_format!r}")
    file = Path(CONFIG if config is None else config)
    if config is None and not file.exists():
        file = Path(__file__).with_name(CONFIG)
        checkpoint = checkpoint or "converted_checkpoints"
    logger.info("settings: %s", file)
    settings = _settle(file, checkpoint)
    store = Path(model_store)
    store.mkdir(parents=True, exist_ok=True)
    target = store / (model_name + SUFFIX[archive_format])
    if target.is_dir() and not (target / "MAR-INF").is_dir():
        raise ValueError(f"{target} exists and is no model archive: it is left alone")
    # Beside the target, so that the finished archive is moved into place in one step.
    with tempfile.TemporaryDirectory(prefix=".build_archive-", dir=store) as scratch:
        made = _run_archiver(Path(scratch), settings, model_name, version, archive_format)
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        made.rename(target)
    return target


def _settle(config: Path, checkpoint: str | None) -> dict[str, Any]:
    """The yaml, checked, with every path made absolute."""
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {config} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {config} is no valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--config {config} holds no keys")
    if checkpoint is not None and isinstance(settings.get("handler"), dict):
        check_converted(checkpoint, "--checkpoint")
        settings["handler"]["converted_ckpt_dir"] = str(Path(checkpoint).resolve())
    checked = read_model_config(settings, base=config.resolve().parent, file=str(config))
    check_converted(checked.converted_ckpt_dir, "converted_ckpt_dir")
    args = ModelArgs.load(checked.model_args_path or checked.converted_ckpt_dir)
    checked.engine.for_model(args)
    mesh_shape(args, checked.degree, _units(checked.converted_ckpt_dir, args))
    load_tokenizer(checked.tokenizer_path or checked.converted_ckpt_dir)
    read_certificate(checked.converted_ckpt_dir)
    for key in PATH_KEYS:
        path: Path | None = getattr(checked, key)
        settings["handler"][key] = str(path.resolve()) if path else None
    return settings


def _units(checkpoint: Path, args: ModelArgs) -> dict[str, int]:
    """What quantized weights do not let be cut anywhere: see `mesh_shape`."""
    if not (checkpoint / FORMATS_FILE).exists():
        return {}
    # Here, since they bring torch along, which takes a second or two.
    import torch

    from llama2.weights.formats.catalog import load_formats
    from llama2.weights.spec import Spec

    return Spec(args=args, dtype=torch.bfloat16, formats=load_formats(checkpoint, args.weight_axes())).units()


def _run_archiver(scratch: Path, settings: dict[str, Any], model_name: str, version: str, archive_format: str) -> Path:
    packages, temporary, out = scratch / "packages", scratch / "tmp", scratch / "out"
    for folder in (packages, temporary, out):
        folder.mkdir()
    for package in PACKAGES:
        shutil.copytree(package, packages / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    certificate = Path(settings["handler"]["converted_ckpt_dir"]) / CERTIFICATE_FILE
    if certificate.exists():
        shutil.copyfile(certificate, packages / CERTIFICATE_FILE)
    yaml_file = scratch / CONFIG
    yaml_file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    command = [
        find_program("torch-model-archiver"),
        *("--model-name", model_name, "--version", version, "--archive-format", archive_format),
        *(
            "--handler",
            str(_ROOT / "handler" / "torchserve" / "llama_handler.py"),
            "--extra-files",
            str(packages),
        ),
        *("--config-file", str(yaml_file), "--export-path", str(out)),
    ]
    # The archiver works in, and first deletes, $TMPDIR/<model name>.
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(temporary)}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"torch-model-archiver failed: {done.stderr.strip().splitlines()[-1:]}")
    return out / (model_name + SUFFIX[archive_format])


def _next_step(target: Path) -> str:
    models = target.name if target.is_dir() else f"{target.stem}={target.name}"
    here = Path() if Path("config.properties").exists() else Path(__file__).parent
    settings = f"--ts-config {here / 'config.properties'} --log-config {here / 'log4j2.xml'}"
    return f"{target} is ready: torchserve --start --ncs {settings} --model-store {target.parent} --models {models}"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_flags(sys.argv[1:], build_archive)
        fire.Fire(build_archive, as_texts(sys.argv[1:]), serialize=_next_step)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
