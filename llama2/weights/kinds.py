"""Owns what a path is that should be a converted checkpoint and is not, in words. Reads no file, and knows no torch."""

from __future__ import annotations

from pathlib import Path

from llama2.errors import InvalidValue

METADATA_FILE = ".metadata"
_CONVERT = "python convert_checkpoints.py --original_ckpt_dir {} --save_checkpoint_dir converted_checkpoints"


def check_converted(path: Path | str, field: str = "checkpoint_dir") -> None:
    """Refuse what is no folder that convert_checkpoints.py wrote; `field` is where the user gave it.

    Raises:
        InvalidValue: it says what `path` is, and what is to be done with it.
    """
    try:
        folder = Path(path)
    except TypeError:
        raise InvalidValue(field, f"must be a folder, got {path!r}") from None
    if (folder / METADATA_FILE).is_file():
        return
    convert = f"convert it first: {_CONVERT.format(folder)}"
    if not folder.exists():
        fault = "does not exist"
        if isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            fault += (
                "; if it is a name on the hub, nothing is fetched from there: download Meta's files (hf download "
                f"{path} --local-dir {folder.name}) and convert them: {_CONVERT.format(folder.name)}"
            )
    elif folder.is_file():
        fault = f"is a GGUF file: {convert}" if folder.suffix == ".gguf" else "is a file, and not a folder"
    elif (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth")):
        fault = f"holds Meta's files: {convert}"
    elif (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        fault = "holds Hugging Face's files, which are not read: get the model in Meta's own format, and convert that"
    else:
        fault = f"is no converted checkpoint: it has no {METADATA_FILE} file, which convert_checkpoints.py writes"
    raise InvalidValue(field, f"{str(path)!r} {fault}")
